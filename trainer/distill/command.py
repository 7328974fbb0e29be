"""``flash-diffusion distill``: read a recipe, then print its plan or run it."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from ..config import Recipe
from ..interrupts import Interrupted, StopRequest
from ..recipes import preset_names, read_recipe, shipped_recipes
from ..rehearse.gpus import DEFAULT_GPU, GPUS, UTILISATION, gpu_of
from ..tasks import TASKS
from ..teachers import FAMILIES

PROGRAM = "flash-diffusion"
EPILOG = f"""shipped recipes: {", ".join(shipped_recipes())}
presets: {", ".join(preset_names())}
model families: {", ".join(FAMILIES)}
tasks: {", ".join(TASKS)}

The run's folder holds:
  lora.safetensors   the LoRA
  README.md          its model card
  config.yaml        every setting of the run
  log.jsonl          losses, health, learning rate and speed
  progress.json      how far the run is, for programs that follow it
  previews/          sample grids, teacher beside student
  tensorboard/       the same curves and grids
  checkpoints/       for --resume and `flash-diffusion export`

Ctrl-C once (or SIGTERM) finishes the update, saves a checkpoint and prints how to
resume; Ctrl-C twice stops at once.

Several GPUs: accelerate launch --multi_gpu -m flash_diffusion.trainer distill ... (docs/scale.md)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion distill``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("recipe", help="YAML file, or name of a shipped recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="set a field of the recipe, such as optimizer.lr=1e-4 or phases.0.updates=100; can be repeated",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="whole settings under the recipe's own fields: paper (as published), best (what helped here), tdm "
        "(prompts alone); rates, rank and budgets of best and tdm follow from the model's and the data's size",
    )
    parser.add_argument("--output", type=Path, help="folder of the run (default: out/NAME OF THE RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last intact checkpoint; begin where there is none"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run and stop; loads no weights")
    rehearsal = parser.add_argument_group(
        "rehearsal", "run one update of each phase at true size without weights, data or GPU, and print what it needs"
    )
    rehearsal.add_argument(
        "--rehearse", action="store_true", help="print memory by moment, work, time and what fits, and stop; minutes"
    )
    rehearsal.add_argument(
        "--gpu", metavar="CARD", default=DEFAULT_GPU, help=f"{', '.join(GPUS)} (default: {DEFAULT_GPU})"
    )
    rehearsal.add_argument("--price", type=positive, metavar="DOLLARS", help="of an hour of the card: prints the cost")
    rehearsal.add_argument(
        "--utilisation",
        type=share,
        default=UTILISATION,
        metavar="SHARE",
        help=f"share of the card's peak that training is assumed to reach, in (0, 1] (default: {UTILISATION})",
    )


def run(args: argparse.Namespace) -> int:
    """Distil a recipe, or print its plan."""
    recipe, reasons = read_recipe(args.recipe, args.overrides, args.preset)
    if args.dry_run:
        from rich.console import Console

        from .plan import print_plan

        print_plan(recipe, Console(), reasons)
        return 0
    if args.rehearse:
        from rich.console import Console

        from ..rehearse.report import print_rehearsal

        gpu = gpu_of(args.gpu)
        print_rehearsal(recipe, gpu, Console(), utilisation=args.utilisation, price=args.price)
        return 0
    output = args.output or Path("out") / Path(args.recipe).stem
    resume = resume_command(args, output)
    stop = StopRequest()
    with stop.listening(lambda: _say("stopping at the next safe point; Ctrl-C again stops at once")):
        try:
            _distil(recipe, output, args.resume, stop)
        except Interrupted as interrupted:
            _say(f"stopped; {_kept(output)}. Go on with:\n    {resume}")
            return interrupted.exit_code
        except KeyboardInterrupt:
            _say(f"stopped at once; {_kept(output)}. Go on with:\n    {resume}")
            _leave(130)
    return 0


def _distil(recipe: Recipe, output: Path, resume: bool, stop: StopRequest) -> None:
    import torch

    from .loop import distil

    # The moments of small adapters pass through denormal numbers, which slow a CPU down tenfold. The setting holds for
    # the whole process, so it is made here and not in the loop, which others may call.
    torch.set_flush_denormal(True)
    distil(recipe, output, resume=resume, stop=stop)


def positive(text: str) -> float:
    """Read a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def share(text: str) -> float:
    """Read a number above 0 and at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text}")
    return value


def resume_command(args: argparse.Namespace, output: Path) -> str:
    """Return the command that continues a run, as it is typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    program = ["python", "-m", module] if module.endswith("trainer") else [PROGRAM]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        program = [
            "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "-m",
            module or "flash_diffusion.trainer",
        ]
    overrides = [part for override in args.overrides for part in ("--set", override)]
    preset = [] if args.preset is None else ["--preset", args.preset]
    command = [*program, "distill", args.recipe, *preset, *overrides, "--output", str(output), "--resume"]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def _kept(output: Path) -> str:
    """Return what a stopped run has kept."""
    from .checkpoint import checkpoints

    found = checkpoints(output)
    if found:
        return f"the last checkpoint is {found[-1]}"
    return "there is no checkpoint yet; what is encoded and recorded stays"


def _say(text: str) -> None:
    """Print a line from the main process, also from inside a signal handler, where a stream's buffer may be in use."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{PROGRAM}: {text}\n".encode())


def _leave(code: int) -> NoReturn:
    """End the process now, without waiting for threads that compute."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
