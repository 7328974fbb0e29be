"""``flash-diffusion distill``: read the recipe, show the plan or run it."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from ..recipes import load_recipe, shipped_recipes
from ..tasks import TASKS
from ..teachers import FAMILIES

EPILOG = f"""shipped recipes: {", ".join(shipped_recipes())}
model families: {", ".join(FAMILIES)}
tasks: {", ".join(TASKS)}

The folder it writes holds lora.safetensors, README.md (a model card), config.yaml (every setting, resolved), log.jsonl,
previews/ (sample grids), tensorboard/ and checkpoints/. Several processes: accelerate launch -m flash_diffusion.trainer
distill ..."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion distill``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a field, such as optimizer.lr=1e-4 or phases.0.updates=100; repeatable",
    )
    parser.add_argument("--output", type=Path, help="the run's folder (default: out/<recipe>)")
    parser.add_argument("--resume", action="store_true", help="continue exactly from the last checkpoint, if any")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; no weights are loaded")


def run(args: argparse.Namespace) -> int:
    """Distil."""
    recipe = load_recipe(args.recipe, args.overrides)
    # PEFT warns whenever a network gets its second adapter, which is how roles share one base here.
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")

    if args.dry_run:
        from rich.console import Console

        from .plan import print_plan

        print_plan(recipe, Console())
        return 0
    import torch

    from .loop import distil

    # Adapters start near 0 and their moments pass through denormal numbers, which slow a CPU down tenfold. It is a
    # setting of the whole process, so it is made here, where the process is ours.
    torch.set_flush_denormal(True)
    output = args.output or Path("out") / Path(args.recipe).stem
    distil(recipe, output, resume=args.resume)
    return 0
