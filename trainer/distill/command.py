"""``flash-diffusion distill``: read a recipe, then print its plan or run it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..recipes import load_recipe, shipped_recipes
from ..tasks import TASKS
from ..teachers import FAMILIES

EPILOG = f"""shipped recipes: {", ".join(shipped_recipes())}
model families: {", ".join(FAMILIES)}
tasks: {", ".join(TASKS)}

The run's folder holds:
  lora.safetensors   the LoRA
  README.md          its model card
  config.yaml        every setting of the run
  log.jsonl          losses, learning rate and speed
  previews/          sample grids, teacher beside student
  tensorboard/       the same curves and grids
  checkpoints/       for --resume and `flash-diffusion export`

Several GPUs: accelerate launch -m flash_diffusion.trainer distill ..."""


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
    parser.add_argument("--output", type=Path, help="folder of the run (default: out/NAME OF THE RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint; begin where there is none"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run and stop; loads no weights")


def run(args: argparse.Namespace) -> int:
    """Distil a recipe, or print its plan."""
    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        from rich.console import Console

        from .plan import print_plan

        print_plan(recipe, Console())
        return 0
    import torch

    from .loop import distil

    # The moments of small adapters pass through denormal numbers, which slow a CPU down tenfold. The setting holds for
    # the whole process, so it is made here and not in the loop, which others may call.
    torch.set_flush_denormal(True)
    output = args.output or Path("out") / Path(args.recipe).stem
    distil(recipe, output, resume=args.resume)
    return 0
