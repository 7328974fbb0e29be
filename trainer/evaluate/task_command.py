"""`flash-diffusion evaluate --task ...`: which teacher, student, pictures and settings the options name."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DataSection, Recipe, TaskSection, parse_recipe
from ..errors import UserError
from .measure import Options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...flash_core.lora import LoraFile
    from ..tasks.base import Task

logger = logging.getLogger(__name__)

TEXT_TO_IMAGE = "text-to-image"
OPTIONS_EXAMPLE = """such as '{"scale": 4}'"""
SAMPLES = 96  # default of --samples: 9,000 passes, 2 to 3 minutes of the demo on one core


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """What conditional tasks take beside the other options."""
    group = parser.add_argument_group("conditional tasks")
    add = group.add_argument
    add(
        "--run",
        type=Path,
        help="the folder of a distillation: its model, task, data and LoRA are evaluated; other options come first",
    )
    add("--task", help="inpainting, super-resolution, face-swap, control (default: the run's, else text-to-image)")
    add(
        "--task-options",
        type=_json_object,
        metavar="JSON",
        help="the task's settings, as in a recipe (default: the run's, else the task adapter's)",
    )
    add(
        "--data",
        help="pictures to make conditions of: a folder with captions, shards, demo, or demo:noto, a style that no "
        "teacher of the demo has seen (default: the run's, else demo)",
    )
    add("--vgg", type=Path, help="VGG-16's weights, to measure LPIPS too (.pth or .safetensors)")


def read_run(folder: Path) -> Recipe:
    """The recipe that a distillation followed.

    Raises:
        UserError: there is none.
    """
    import yaml

    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"--run: {folder} is not the folder of a distillation: it has no config.yaml")
    return parse_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def follow_run(args: argparse.Namespace) -> None:
    """Fill in what ``--run`` says and no other option does.

    Raises:
        UserError: there is no such run, or it has no LoRA yet.
    """
    args.run_recipe = None
    if args.run is None:
        args.task = args.task or TEXT_TO_IMAGE
        args.family = args.family or "demo"
        args.guidance = Options().guidance if args.guidance is None else args.guidance
        return
    recipe = args.run_recipe = read_run(args.run)
    if args.lora is None:
        args.lora = args.run / "lora.safetensors"
        if not args.lora.is_file():
            raise UserError(
                f"--run: {args.run} has no lora.safetensors yet; let it end, or write one with "
                f"`flash-diffusion export {args.run}`"
            )
    model = recipe.model.model_dump(mode="json", exclude_defaults=True)
    args.family = args.family or model["family"]
    args.teacher = args.teacher or model.get("path")
    args.model = [
        f"{name}={json.dumps(value)}" for name, value in model.items() if name not in ("family", "path")
    ] + args.model
    args.task = args.task or recipe.task.name
    args.guidance = sum(recipe.method.guidance) / 2 if args.guidance is None else args.guidance
    if args.task == recipe.task.name and args.task_options is None:
        args.task_options = recipe.task.options
    args.resolution = args.resolution or recipe.data.resolution


def task_of(args: argparse.Namespace) -> Task:
    """The task with its options; where the model's adapter is told nothing else, with those it learnt.

    Adds the demo's own adapter of the task to the model's fields where neither a teacher nor an adapter is named.

    Raises:
        UserError: no such task, options that do not fit, or an adapter of another task.
    """
    from ..demo.assets import TASK_ADAPTERS
    from ..tasks import build_task
    from ..teachers.conditions.task_adapters import find_task_adapter

    fields = dict(pair.partition("=")[::2] for pair in args.model)
    shipped = TASK_ADAPTERS / f"{args.task}.safetensors"
    if args.family == "demo" and args.teacher is None and "task_adapter" not in fields and shipped.is_file():
        fields["task_adapter"] = args.task
        args.model.append(f"task_adapter={args.task}")
    options = args.task_options
    if "task_adapter" in fields:
        adapter = find_task_adapter(fields["task_adapter"].strip("\"'"))
        if adapter.task != args.task:
            raise UserError(
                f"--task {args.task}: the model's task adapter, {fields['task_adapter']}, was made for {adapter.task}; "
                "choose the task or the adapter that belongs to the other"
            )
        options = adapter.options if options is None else options
    return build_task(TaskSection(name=args.task, options=dict(options or {})))


def check_lora_task(lora: LoraFile, path: Path, task: str) -> None:
    """Look whether a LoRA was distilled for the task; one for text alone is tried on any, and said to be.

    Raises:
        UserError: it was distilled for another.
    """
    if lora.metadata is None or lora.metadata.task == task:
        return
    if lora.metadata.task != TEXT_TO_IMAGE:
        raise UserError(
            f"{path} was distilled for {lora.metadata.task}, not for {task}; choose --task {lora.metadata.task}, or a "
            f"LoRA for {task}"
        )
    logger.warning("%s was distilled for text-to-image; it is measured on %s without further training.", path, task)


def evaluate_task(args: argparse.Namespace, console: Any) -> bool:
    """Measure a student on its task; whether there is a report."""
    from ..files import fingerprint
    from ..metrics.feature_network import FeatureNetwork
    from .command import load_generator, pick_device
    from .task_comparison import compare_on_task
    from .task_samples import read_subjects

    task = task_of(args)
    options = Options(
        samples=SAMPLES if args.samples is None else args.samples,
        times=1,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        pictures=args.pictures,
    )
    data: str | DataSection = args.data or "demo"
    if args.data is None and args.run_recipe is not None:
        data = args.run_recipe.data
    subjects = read_subjects(data, task, options.samples, options.seed)
    teacher, weights, student = load_generator(args, pick_device(args), task)
    network = FeatureNetwork.from_pretrained(args.features).to(teacher.device)
    perceptual = None if args.vgg is None else _lpips(args.vgg, teacher.device)
    compare_on_task(
        teacher,
        task,
        subjects,
        network,
        options,
        output=args.output,
        student=student,
        perceptual=perceptual,
        facts={
            "teacher": weights,
            "features": fingerprint(args.features),
            "lora": str(args.lora) if args.lora else None,
            "model": list(args.model),
        },
        console=console,
    )
    return True


def _lpips(vgg: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS of pictures in [0, 1]."""
    from ..metrics.lpips import lpips

    network = lpips(device, vgg)
    return lambda made, wanted: network((made * 2 - 1).to(device), (wanted * 2 - 1).to(device)).double().cpu()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); expected {OPTIONS_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, {OPTIONS_EXAMPLE}, got {text!r}")
    return value
