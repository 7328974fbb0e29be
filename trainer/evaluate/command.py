"""`flash-diffusion evaluate`: three questions about a student, each with its report.

- How close do its few steps come to its teacher's many? (`comparison.py`; needs no data, and is the default)
- How well does it inpaint, enlarge, swap faces, follow edges? (`task_comparison.py`; `--task`, or a run's own)
- What are its FID and CLIP score on COCO, as the papers print them? (`zero_shot.py`; `--protocol`)
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..demo.assets import FEATURES, ROOT
from ..demo.assets import TEACHER as DEMO_TEACHER
from ..errors import UserError
from ..files import fingerprint
from ..metrics.clip_score import DEFAULT as DEFAULT_CLIP
from ..metrics.distances import frechet_distance
from .coco.protocols import PROTOCOLS
from .generate import SamplingSetting
from .measure import FEW_STEPS, Evaluation, Options, progress_bar
from .task_command import SAMPLES, TEXT_TO_IMAGE, add_task_arguments, check_lora_task, evaluate_task, follow_run
from .teacher_comparison import REFERENCE, evaluate, origin_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..config import ModelSection
    from ..tasks.base import Task
    from ..teachers.base import Teacher

logger = logging.getLogger(__name__)

DEMO_REFERENCE = ROOT / REFERENCE
EPILOG = """With --task, the task's own figures; a run's folder says what it was:

  flash-diffusion evaluate --task inpainting --lora out/inpainting/lora.safetensors --output out/inpainting-report
  flash-diffusion evaluate --run out/inpainting --output out/inpainting-report

With --protocol, FID and CLIP score on COCO instead:

  flash-diffusion evaluate --protocol coco2017-5k --coco /data/coco --family sd15 --teacher /models/sd15 \\
      --lora lora.safetensors --output out/coco --runs student:4 student:2 teacher:25:7.5

A killed evaluation goes on where it was. Several devices: accelerate launch -m flash_diffusion.trainer evaluate ...
docs/evaluation.md says what the protocols are, and has the commands for the paper's table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    defaults = Options()
    add = parser.add_argument
    add("--lora", type=Path, help="the student: a LoRA's .safetensors, or a PEFT folder (default: none)")
    add("--teacher", help="diffusers folder, Hub name or single checkpoint (default: the embedded demo)")
    add("--family", help="the teacher's model family (default: the run's, else demo)")
    add("--output", type=Path, default=Path("out/evaluation"), help="folder (default: %(default)s)")
    add(
        "--samples",
        type=int,
        help=f"pictures a run (default: {defaults.samples}; with --task: {SAMPLES}; with --protocol: the protocol's)",
    )
    add(
        "--prompts",
        type=Path,
        help="text file, one prompt a line (default: the demo's general captions, each drawn as often as it is there; "
        "with --protocol: COCO's captions)",
    )
    add("--seed", type=int, default=defaults.seed, help="of prompts and noise (default: %(default)s)")
    add("--batch-size", type=int, default=defaults.batch_size, help="pictures at once (%(default)s)")
    add("--pictures", type=int, default=defaults.pictures, help="prompts in the report (%(default)s)")
    add("--log", type=Path, help="log.jsonl of the training (default: the one beside the LoRA)")
    add("--device", help="cpu, cuda, mps, ... (default: cuda where there is one)")
    add(
        "--model",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another field of a recipe's model section, in YAML or JSON, such as dtype=bfloat16 or "
        "control='{path: FOLDER, scale: 0.8}'; repeatable",
    )
    add("--resolution", type=int, help="of the pictures in pixels (default: the model's own)")

    add_task_arguments(parser)
    group = parser.add_argument_group("comparison with the teacher")
    add = group.add_argument
    add("--features", type=Path, default=FEATURES, help="the feature network (default: the demo's)")
    add("--steps", type=int, default=defaults.steps, help="of the reference (default: %(default)s)")
    add(
        "--guidance",
        type=float,
        help="the teacher's scale w in uncond + w (cond - uncond) (default: the middle of the run's, else "
        f"{defaults.guidance})",
    )
    add(
        "--make-reference",
        action="store_true",
        help="make all of the teacher's sets, write them to --reference, and stop",
    )
    add(
        "--reference",
        type=Path,
        help="the teacher's sets as features (default: the demo's); with --protocol: the statistics of COCO's "
        "pictures, made where they are missing (default: in --output)",
    )

    group = parser.add_argument_group("zero-shot protocol")
    add = group.add_argument
    add("--protocol", choices=list(PROTOCOLS), help="what to measure by")
    add("--coco", type=Path, help="the folder with annotations/ and val2017/ or val2014/")
    add(
        "--runs",
        nargs="+",
        type=parse_run,
        metavar="ROLE:STEPS[:GUIDANCE]",
        help="such as student:4 teacher:25:7.5; guidance 1 is none, and the default "
        f"(default: {' '.join(f'student:{steps}' for steps in FEW_STEPS)}; without a LoRA teacher:STEPS:GUIDANCE)",
    )
    add("--inception", type=Path, help="FID's Inception weights, .pth or .safetensors (default: downloaded once)")
    add("--clip", default=DEFAULT_CLIP, help="a CLIP for transformers, folder or Hub name (default: %(default)s)")
    add("--no-clip", action="store_true", help="FID alone")
    add(
        "--precision",
        default="no",
        choices=["no", "bf16", "fp16"],
        help="of the forward passes that make pictures; the measuring is in float32 (default: %(default)s)",
    )


def parse_run(text: str) -> SamplingSetting:
    """A run from ``student:4`` or ``teacher:25:7.5``."""
    role, *numbers = text.split(":")
    try:
        steps, guidance = int(numbers[0]), float(numbers[1]) if len(numbers) > 1 else 1.0
        if role not in ("teacher", "student") or len(numbers) > 2 or steps < 1 or not guidance >= 1:
            raise ValueError
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no run; expected student:STEPS or teacher:STEPS:GUIDANCE, steps and guidance at least 1"
        ) from None
    return SamplingSetting("student" if role == "student" else "teacher", steps, guidance)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write `report.json` and `report.html`, and print the numbers."""
    from rich.console import Console

    from ..report.build import print_report, write_report

    console = Console()
    follow_run(args)
    check(args)
    if args.protocol is not None:
        done = measure_on_coco(args, console)
    else:
        done = compare(args, console) if args.task == TEXT_TO_IMAGE else evaluate_task(args, console)
    if done:
        page = write_report(args.output, args.log or (args.lora.with_name("log.jsonl") if args.lora else None))
        print_report(args.output, page, console)
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise a :class:`UserError` for options that mean nothing."""
    least = {"samples": 2, "steps": 1, "guidance": 1, "batch_size": 1, "pictures": 1}
    for name, value in least.items():
        if (given := getattr(args, name)) is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} must be at least {value}, got {given}")
    if args.lora is not None and not args.lora.exists():
        raise UserError(f"there is no LoRA at {args.lora}; make one with `flash-diffusion distill`")
    if args.protocol is None:
        if args.coco is not None or args.runs is not None:
            raise UserError("--coco and --runs belong to a --protocol; expected one of " + ", ".join(PROTOCOLS))
        check_task(args)
        return
    if args.task != TEXT_TO_IMAGE:
        raise UserError(f"--protocol measures text-to-image, not --task {args.task}; give one of the two")
    if args.coco is None:
        raise UserError(f"--protocol {args.protocol} needs --coco, the folder of COCO's annotations and pictures")
    if args.lora is None and any(run.role == "student" for run in args.runs or ()):
        raise UserError("--runs names a student, but there is no --lora; expected the LoRA, or teacher runs alone")


def check_task(args: argparse.Namespace) -> None:
    """Raise a :class:`UserError` for options that belong to other tasks."""
    from ..tasks import TASKS

    if args.task not in TASKS:
        raise UserError(f"--task: there is no task {args.task!r}; expected one of {', '.join(TASKS)}")
    if args.task != TEXT_TO_IMAGE:
        taken = {"prompts": args.prompts, "reference": args.reference, "make-reference": args.make_reference or None}
        where = "text-to-image: a task's captions come with --data, and its reference is made anew"
    else:
        taken = {"data": args.data, "task-options": args.task_options or None, "vgg": args.vgg}
        where = "conditional tasks; name one with --task"
    if given := [f"--{name}" for name, value in taken.items() if value is not None]:
        raise UserError(f"{' and '.join(given)}: these are options of {where}")


def compare(args: argparse.Namespace, console: Console) -> bool:
    """The comparison with the teacher; whether there is a report."""
    from ..metrics.feature_network import FeatureNetwork as Features

    defaults = Options()
    options = Options(
        samples=defaults.samples if args.samples is None else args.samples,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        batch_size=args.batch_size,
        pictures=args.pictures,
    )
    teacher, weights, student = load_generator(args, pick_device(args))
    network = Features.from_pretrained(args.features).to(teacher.device)
    prompts = read_prompts(args.prompts) if args.prompts else network.general
    known = {"teacher": weights, "features": fingerprint(args.features)}
    stored = args.reference or DEMO_REFERENCE
    if args.make_reference:
        with progress_bar(console) as progress:
            origin = origin_of(teacher, prompts, options, **known)
            reference = Evaluation(teacher, network, prompts, options, progress).make_reference(origin)
        reference.save(stored)
        floor = frechet_distance(reference.second.features, reference.first.features)
        console.print(f"reference {stored}: the floor's Fréchet distance is {floor:.4g}", soft_wrap=True)
        return False
    evaluate(
        teacher,
        network,
        prompts,
        options,
        **known,
        output=args.output,
        student=student,
        references=[stored, args.output / REFERENCE],
        console=console,
    )
    return True


def measure_on_coco(args: argparse.Namespace, console: Console) -> bool:
    """FID and CLIP score by a protocol; whether this process has written a report."""
    from datetime import timedelta

    from accelerate import PartialState

    from .coco.captions import read_coco
    from .coco.zero_shot import Settings, Sources, zero_shot

    protocol = PROTOCOLS[args.protocol]
    prompts = read_prompts(args.prompts) if args.prompts else None
    coco = read_coco(args.coco, protocol, args.samples, prompts)
    usual = (
        [SamplingSetting("student", steps) for steps in FEW_STEPS]
        if args.lora
        else [SamplingSetting("teacher", args.steps, args.guidance)]
    )
    settings = Settings(
        runs=tuple(dict.fromkeys(args.runs or usual)),
        seed=args.seed,
        batch_size=args.batch_size,
        precision=args.precision,
        pictures=args.pictures,
    )
    # A process waits for the slowest one, which may have many pictures to make.
    state = PartialState(cpu=pick_device(args) == "cpu", timeout=timedelta(days=7))
    if (launched := int(os.environ.get("WORLD_SIZE", "1"))) != state.num_processes:
        raise UserError(
            f"{launched} processes were launched, but {pick_device(args)} can't be shared out between them here; "
            "launch one, or pass --device cpu"
        )
    if not state.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    device = state.device if args.device in (None, state.device.type) else args.device  # a process, a device
    return zero_shot(
        coco,
        protocol,
        settings,
        Sources(
            lambda: load_generator(args, str(device)),
            args.lora,
            args.prompts or args.coco / protocol.annotations,
            args.inception,
            None if args.no_clip else args.clip,
            args.reference or args.output / f"{protocol.name}.safetensors",
        ),
        args.output,
        state,
        console if state.is_main_process else None,
    )


def pick_device(args: argparse.Namespace) -> str:
    """The device asked for, else a CUDA device where there is one."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_generator(args: argparse.Namespace, device: str, task: Task | None = None) -> tuple[Teacher, str, str | None]:
    """The teacher with the student's LoRA on it, the fingerprint of the teacher's weights, and the student's title.

    Args:
        task: what both are evaluated on, where it is not text alone.

    Raises:
        UserError: the model does not read what the task gives it, or the LoRA is for another task.
    """
    from ...flash_core.lora import read_lora
    from ..config import TaskSection
    from ..tasks import build_task
    from ..tasks.requirements import check_channels, check_control
    from ..teachers import load_teacher

    section = model_section(args)
    check_control(task or build_task(TaskSection()), section)
    teacher = load_teacher(section, device, args.resolution)
    folder = Path(args.teacher) if args.teacher else DEMO_TEACHER
    if task is not None:
        check_channels(task, teacher)
    weights = fingerprint(folder) if folder.is_dir() and not args.model else teacher.weights_hash()
    if args.lora is None:
        return teacher, weights, None
    lora = read_lora(args.lora)
    check_lora_task(lora, args.lora, TEXT_TO_IMAGE if task is None else task.name)
    made_for = lora.metadata.teacher_hash if lora.metadata is not None else ""
    trained_for_it = task is None or (lora.metadata is not None and lora.metadata.task == task.name)
    if trained_for_it and made_for and made_for != teacher.weights_hash():
        logger.warning("%s was distilled from a teacher with other weights than %s.", args.lora, teacher.name)
    teacher.denoiser.load_adapter("student", lora.modules)
    return teacher, weights, lora.metadata.title if lora.metadata is not None else args.lora.stem


def model_section(args: argparse.Namespace) -> ModelSection:
    """Which teacher the options name.

    Raises:
        UserError: a ``--model`` that is no field of the section, or no value of it.
    """
    import yaml
    from pydantic import ValidationError

    from ..config import ModelSection, explain

    fields = {"family": args.family, "path": args.teacher}
    for pair in args.model:
        name, found, value = pair.partition("=")
        if not found:
            raise UserError(f"--model: expected KEY=VALUE, got {pair!r}")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--model: the value of {name} is not YAML or JSON: {value!r}; expected a value, or fields such as "
                "'{path: FOLDER, scale: 0.8}'"
            ) from error
    try:
        return ModelSection.model_validate(fields)
    except ValidationError as error:
        lines = explain(error, within=("model",))
        raise UserError("--model, as a recipe's model section:\n" + "\n".join(lines)) from error


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected one a line")
    return prompts
