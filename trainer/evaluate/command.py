"""`flash-diffusion evaluate`: read the command line, make a request of it, and run an evaluation.

- How close do a student's few steps come to its teacher's many? (`teacher_comparison.py`; the default, needs no data)
- How well does a student inpaint, enlarge, swap faces, follow edges? (`task_comparison.py`; `--task`, `--run`)
- Which stochasticity draws best? (`tuning/`; `--tune-sampler`)
- What are a student's FID and CLIP score on COCO? (`coco/zero_shot.py`; `--protocol`)
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..demo.assets import TASK_ADAPTERS
from ..errors import UserError
from ..metrics.clip_score import DEFAULT as DEFAULT_CLIP
from ..recipes import LORA_FILE, load_run_recipe
from .coco.protocols import PROTOCOLS
from .generate import SamplingSetting
from .request import (
    COCO_STEPS,
    TASK_SAMPLES,
    TEXT_TO_IMAGE,
    CocoOptions,
    CocoRequest,
    EvaluationRequest,
    ModelRequest,
    Options,
    TaskComparisonRequest,
    TeacherComparisonRequest,
    model_section,
    read_task,
)
from .teacher.defaults import default_features, default_reference
from .tuning.tune import STEP_COUNTS, VALUES, tune_sampler, tuning_request

TASK_OPTIONS = ("data", "task_options", "vgg")
TEXT_OPTIONS = ("preference", "targets")  # of a comparison with the teacher of text-to-image
PROTOCOL_OPTIONS = ("coco", "runs", "inception", "clip", "no_clip", "precision")
OPTIONS_EXAMPLE = """such as '{"scale": 4}'"""
EPILOG = """examples:

  Compare a student with its teacher:
    flash-diffusion evaluate --lora out/my-lora/lora.safetensors --output out/report

  Evaluate a distillation on its own task (the folder of the run names model, task, data and LoRA):
    flash-diffusion evaluate --run out/inpainting --output out/inpainting-report

  Measure which stochasticity draws best in 2, 4 and 8 steps, and write it into the LoRA:
    flash-diffusion evaluate --run out/my-lora --tune-sampler --write --output out/tuning

  Measure FID and CLIP score on COCO:
    flash-diffusion evaluate --protocol coco2017-5k --coco /data/coco --family sd15 --teacher /models/sd15 \\
        --lora lora.safetensors --output out/coco --runs student:4 student:2 teacher:25:7.5

  Use several devices (--protocol only):
    accelerate launch --multi_gpu -m flash_diffusion.trainer evaluate --protocol ...

A killed --protocol evaluation goes on where it stopped when the same command is given again.
docs/evaluation.md describes the protocols and has the commands for the paper's table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flash-diffusion evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    defaults = Options()
    add = parser.add_argument
    add(
        "--lora",
        type=_path,
        help="the student: a LoRA file (.safetensors) or PEFT folder (default: the run's, else none)",
    )
    add(
        "--teacher",
        type=_home,
        help="the teacher: diffusers folder, Hub name or single checkpoint (default: the run's, else the demo)",
    )
    add("--family", help="model family of the teacher (default: the run's, else demo)")
    add("--output", type=_path, default=Path("out/evaluation"), help="folder for the report (default: %(default)s)")
    add(
        "--samples",
        type=int,
        help=f"pictures per run (default: {defaults.samples}; with --task: {TASK_SAMPLES}; with --protocol: all of the "
        "protocol's captions)",
    )
    add(
        "--prompts",
        type=_path,
        help="text file with one prompt a line (default: the captions of the run's data, else those that the feature "
        "network knows; with --protocol: COCO's captions)",
    )
    add("--seed", type=int, default=defaults.seed, help="seed of prompts and noise (default: %(default)s)")
    add("--batch-size", type=int, default=defaults.batch_size, help="pictures made at once (default: %(default)s)")
    add("--pictures", type=int, default=defaults.pictures, help="prompts shown in the report (default: %(default)s)")
    add("--log", type=_path, help="log.jsonl of the training, for its curves (default: the one beside the LoRA)")
    add("--device", help="cpu, cuda, mps, ... (default: cuda where there is a CUDA device, else cpu)")
    add(
        "--model",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set another field of a recipe's model section; the value is YAML or JSON, such as dtype=bfloat16 or "
        "control='{path: FOLDER, scale: 0.8}'; can be repeated",
    )
    add(
        "--stochasticity",
        type=float,
        help="share of fresh noise between the student's steps, 0 to 1 (default: the LoRA's own, else 1)",
    )
    add("--resolution", type=int, help="width and height of the pictures in pixels (default: the model's own)")

    add = parser.add_argument_group("conditional tasks").add_argument
    add(
        "--run",
        type=_path,
        help="folder of a distillation: evaluate its LoRA with its model, task, data, steps, solver and "
        "guidance; other options win",
    )
    add("--task", help="inpainting, super-resolution, face-swap or control (default: the run's, else text-to-image)")
    add(
        "--task-options",
        type=_json_object,
        metavar="JSON",
        help="settings of the task, as in a recipe (default: the run's, else the settings stored in the task adapter)",
    )
    add(
        "--data",
        type=_home,
        help="pictures to make conditions from: a folder with captions, shards, demo, or demo:noto (a style that no "
        "teacher of the demo has seen) (default: the run's, else demo)",
    )
    add("--vgg", type=_path, help="VGG-16 weights (.pth or .safetensors): measure LPIPS too")

    add = parser.add_argument_group("comparison with the teacher").add_argument
    add(
        "--features",
        type=_path,
        help="the network that describes pictures: folder of a feature network, folder of a CLIP, or weights file of "
        "FID's Inception (default: the embedded teacher's own, else the demo's, which has seen only emoji)",
    )
    add(
        "--steps",
        type=int,
        help=f"teacher's steps in the reference (default: the run's method.teacher_steps, else {defaults.steps})",
    )
    add(
        "--guidance",
        type=float,
        help="teacher's guidance scale w in uncond + w (cond - uncond) (default: middle of the run's range, else "
        f"{defaults.guidance})",
    )
    add(
        "--seeds",
        type=int,
        default=defaults.seeds,
        help="sets of the student's pictures, each from its own noise; with a task: sets of samples, each with its own "
        "noise and drawn conditions. The report shows mean and standard deviation (default: %(default)s)",
    )
    add(
        "--preference",
        type=_path,
        help="model of human preference: weights file of HPSv2 or ImageReward (with their library), folder of a "
        "PickScore or a CLIP; its mean score is shown for each run",
    )
    add(
        "--targets",
        choices=["shipped", "make-demo"],
        default=defaults.targets,
        help="with the demo's teacher: the targets of the LoRA that ships, or of the student of `make demo` (default: "
        "%(default)s)",
    )
    add("--make-reference", action="store_true", help="make the teacher's reference, write it to --reference, and stop")
    add(
        "--reference",
        type=_path,
        help="features of the teacher's reference (default: the demo's); with a task: the teacher's answers, made "
        "where they are missing, so that the next student costs only its own passes; --seeds has one file a set "
        "(default: not kept); with "
        "--protocol: statistics of COCO's pictures, made where they are missing (default: in --output)",
    )

    add = parser.add_argument_group("the student's sampler").add_argument
    add(
        "--tune-sampler",
        nargs="*",
        type=float,
        metavar="VALUE",
        help="measure the distance to the teacher at these values of stochasticity (default: "
        f"{' '.join(f'{value:g}' for value in VALUES)}) in {', '.join(map(str, STEP_COUNTS))} steps, choose, and stop",
    )
    add(
        "--write",
        action="store_true",
        help="with --tune-sampler: write the choice into the LoRA's metadata, and into the run's folder for exports",
    )

    add = parser.add_argument_group("zero-shot evaluation on COCO").add_argument
    add("--protocol", choices=list(PROTOCOLS), help="protocol to measure by")
    add("--coco", type=_path, help="folder with annotations/ and val2017/ or val2014/")
    add(
        "--runs",
        nargs="+",
        type=parse_run,
        metavar="ROLE:STEPS[:GUIDANCE]",
        help="runs to compare, such as student:4 teacher:25:7.5; guidance 1 (the default) = no guidance "
        f"(default: {' '.join(f'student:{steps}' for steps in COCO_STEPS)}; without a LoRA: teacher:STEPS:GUIDANCE)",
    )
    add("--inception", type=_path, help="Inception weights for FID, .pth or .safetensors (default: downloaded once)")
    add("--clip", default=DEFAULT_CLIP, help="CLIP model for transformers: folder or Hub name (default: %(default)s)")
    add("--no-clip", action="store_true", help="measure FID only")
    add(
        "--precision",
        default="no",
        choices=["no", "bf16", "fp16"],
        help="precision of the passes that make pictures; no = float32; metrics are always in float32 "
        "(default: %(default)s)",
    )


def _path(text: str) -> Path:
    """Return a path, with the user's home for ``~``."""
    return Path(text).expanduser()


def _home(text: str) -> str:
    """Return a path or a Hub name, with the user's home for ``~``."""
    return str(_path(text)) if text.startswith("~") else text


def parse_run(text: str) -> SamplingSetting:
    """Read a run such as ``student:4`` or ``teacher:25:7.5``."""
    role, *numbers = text.split(":")
    try:
        steps, guidance = int(numbers[0]), float(numbers[1]) if len(numbers) > 1 else 1.0
        if role not in ("teacher", "student") or len(numbers) > 2 or steps < 1 or not guidance >= 1:
            raise ValueError
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a run; expected student:STEPS or teacher:STEPS:GUIDANCE, steps and guidance at least 1"
        ) from None
    return SamplingSetting("student" if role == "student" else "teacher", steps, guidance)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); expected {OPTIONS_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, {OPTIONS_EXAMPLE}, got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Evaluate, write `report.json` and `report.html`, and print the figures."""
    from rich.console import Console

    from ..report.build import print_report, write_report
    from ..report.charts import read_log

    if args.tune_sampler is not None and args.samples is None:
        args.samples = Options().samples  # of a task too: set distances need more than its other figures
    console, request = Console(stderr=True), request_of(args)  # the figures go to stdout, the progress beside them
    if args.tune_sampler is not None:
        tune_sampler(tuning_request(args, request), console)
        return 0
    if request.log is not None and request.log.is_file():
        read_log(request.log)  # a broken log must not end the evaluation after hours
    if isinstance(request, CocoRequest):
        from .coco.zero_shot import evaluate_on_coco

        done = evaluate_on_coco(request, console)
    elif isinstance(request, TaskComparisonRequest):
        from .task_comparison import compare_on_task

        done = compare_on_task(request, console)
    else:
        from .teacher_comparison import compare_with_teacher

        assert isinstance(request, TeacherComparisonRequest)
        done = compare_with_teacher(request, console)
    if done:
        print_report(request.output, write_report(request.output, request.log), Console())
    return 0


# -- from options to a request ---------------------------------------------------------------------------------------


def request_of(args: argparse.Namespace) -> EvaluationRequest:
    """Make the request that the options ask for; an option wins over the run's recipe.

    Raises:
        UserError: an option has no meaning here, or names something that is not there.
    """
    recipe = load_run_recipe(args.run) if args.run is not None else None
    task = args.task or (recipe.task.name if recipe else TEXT_TO_IMAGE)
    lora = args.lora if args.lora is not None or recipe is None else run_lora(args.run)
    check(args, task, lora)
    guidance, steps = args.guidance, args.steps
    if guidance is None:
        guidance = sum(recipe.method.guidance) / 2 if recipe else Options().guidance
    if steps is None:
        steps = recipe.method.teacher_steps if recipe else Options().steps
    common = {"output": args.output, "log": args.log or (lora.with_name("log.jsonl") if lora else None)}
    shared = {"seed": args.seed, "batch_size": args.batch_size, "pictures": args.pictures}
    model = model_request(args, recipe, task, lora)
    if args.protocol is not None:
        protocol = PROTOCOLS[args.protocol]
        usual = [SamplingSetting("student", steps) for steps in COCO_STEPS]
        runs = args.runs or (usual if lora else [SamplingSetting("teacher", steps, guidance)])
        return CocoRequest(
            model=model,
            **common,
            options=CocoOptions(tuple(dict.fromkeys(runs)), precision=args.precision, **shared),
            protocol=protocol,
            coco=args.coco,
            samples=args.samples,
            prompts=args.prompts,
            inception=args.inception,
            clip=None if args.no_clip else args.clip,
            statistics=args.reference or args.output / f"{protocol.name}.safetensors",
        )
    shared |= {"steps": steps, "guidance": guidance}
    if recipe is not None:
        shared |= {"solver": recipe.method.solver, "interval": recipe.method.guidance_interval}
    if task == TEXT_TO_IMAGE:
        return TeacherComparisonRequest(
            model=model,
            **common,
            options=Options(
                samples=Options().samples if args.samples is None else args.samples,
                seeds=args.seeds,
                targets=args.targets,
                **shared,
            ),
            features=args.features or default_features(model.section),
            prompts=args.prompts,
            data=recipe.data if recipe else None,
            reference=args.reference or default_reference(model.section),
            make_reference=args.make_reference,
            preference=args.preference,
        )
    options = args.task_options
    if options is None and recipe is not None and recipe.task.name == task:
        options = recipe.task.options
    return TaskComparisonRequest(
        task=read_task(task, options, model.section),
        model=model,
        **common,
        options=Options(
            samples=TASK_SAMPLES if args.samples is None else args.samples, times=1, seeds=args.seeds, **shared
        ),
        data=args.data or (recipe.data if recipe else "demo"),
        features=args.features or default_features(model.section),
        vgg=args.vgg,
        reference=args.reference,
    )


def run_lora(folder: Path) -> Path:
    """Return the LoRA of a distillation's folder.

    Raises:
        UserError: the folder has no LoRA yet.
    """
    path = folder / LORA_FILE
    if not path.is_file():
        raise UserError(
            f"--run: {folder} has no {LORA_FILE} yet; wait for the end of the distillation, or write the LoRA "
            f"with `flash-diffusion export {folder}`"
        )
    return path


def check(args: argparse.Namespace, task: str, lora: Path | None) -> None:
    """Raise a :class:`UserError` for options that have no meaning, or none for this evaluation."""
    from ..tasks import TASKS

    least = {"samples": 2, "seeds": 1, "steps": 1, "guidance": 1, "batch_size": 1, "pictures": 1, "resolution": 8}
    for name, value in least.items():
        if (given := getattr(args, name)) is not None and not (given >= value and math.isfinite(given)):
            raise UserError(f"--{name.replace('_', '-')} must be at least {value}, got {given}")
    if args.write and args.tune_sampler is None:
        raise UserError("--write writes the result of --tune-sampler; give both")
    if args.stochasticity is not None and not 0 <= args.stochasticity <= 1:
        raise UserError(f"--stochasticity must be from 0 to 1, got {args.stochasticity:g}")
    if lora is not None and not lora.exists():
        raise UserError(f"--lora: there is no LoRA at {lora}; make a LoRA with `flash-diffusion distill`")
    if args.log is not None and not args.log.is_file():
        raise UserError(f"--log: there is no file {args.log}; give the log.jsonl of the training, or leave --log out")
    if args.preference is not None and not args.preference.exists():
        raise UserError(f"--preference: there is nothing at {args.preference}; give a model's file or folder")
    check_output(args.output)
    if args.protocol is not None:
        if task != TEXT_TO_IMAGE:
            raise UserError(f"--protocol measures text-to-image, not --task {task}; give only one of the two options")
        if args.coco is None:
            raise UserError(f"--protocol {args.protocol} needs --coco, the folder of COCO's annotations and pictures")
        if lora is None and any(run.role == "student" for run in args.runs or ()):
            raise UserError("--runs names a student, but there is no --lora; give the LoRA, or only teacher runs")
        refuse(
            args,
            ("features", "make_reference", "seeds", *TEXT_OPTIONS, *TASK_OPTIONS),
            "other evaluations; leave --protocol out for those",
        )
        return
    refuse(
        args,
        PROTOCOL_OPTIONS,
        f"a --protocol, one of {', '.join(PROTOCOLS)}; without one, --features names the network",
    )
    if task not in TASKS:
        raise UserError(f"--task: there is no task {task!r}; expected one of {', '.join(TASKS)}")
    if task != TEXT_TO_IMAGE:
        where = "text-to-image; a task takes its captions from --data"
        refuse(args, ("prompts", "make_reference", *TEXT_OPTIONS), where)
    else:
        refuse(args, TASK_OPTIONS, "conditional tasks; name a task with --task")


def refuse(args: argparse.Namespace, names: Sequence[str], where: str) -> None:
    """Raise a :class:`UserError` if one of the options was given; ``where`` says what the options belong to."""
    unset = {"clip": DEFAULT_CLIP, "precision": "no", "seeds": 1, "targets": "shipped"}
    wrong = [name for name in names if getattr(args, name) not in (None, False, unset.get(name))]
    if wrong:
        told = " and ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise UserError(f"{told}: these are options of {where}")


def check_output(folder: Path) -> None:
    """Raise a :class:`UserError` for a folder that can't be written, before the hours of an evaluation."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(
            f"--output: {there} is a file; expected a folder for the report, which is made if it is missing"
        )
    if not os.access(there, os.W_OK):
        raise UserError(f"--output: {there} is not writable; make it writable, or choose another folder")


def model_request(args: argparse.Namespace, recipe: Recipe | None, task: str, lora: Path | None) -> ModelRequest:
    """Return the teacher and the student that the options name, else the run's.

    The demo's teacher gets the demo's own adapter of the task where no other adapter is named.
    """
    family = args.family or (recipe.model.family if recipe else "demo")
    path = args.teacher or (recipe.model.path if recipe else None)
    own = recipe.model.model_dump(mode="json", exclude_defaults=True) if recipe else {}
    fields = [f"{name}={json.dumps(value)}" for name, value in own.items() if name not in ("family", "path")]
    fields += args.model
    has_adapter = any(pair.startswith("task_adapter=") for pair in fields)
    shipped = task != TEXT_TO_IMAGE and (TASK_ADAPTERS / f"{task}.safetensors").is_file()
    if family == "demo" and path is None and shipped and not has_adapter:
        fields.append(f"task_adapter={task}")
    resolution = args.resolution or (recipe.data.resolution if recipe else None)
    return ModelRequest(
        model_section(family, path, fields), tuple(fields), lora, args.device, resolution, args.stochasticity
    )
