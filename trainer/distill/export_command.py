"""``flash-diffusion export``: write the LoRA of a run's checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from rich.console import Console

from ..config import parse_recipe
from ..errors import UserError
from ..export.export import export_run
from .checkpoint import checkpoint_path, checkpoints, read_average, read_facts


def export_checkpoint(run: Path, update: int | None = None) -> Path:
    """Write the LoRA and the card of a run from one of its checkpoints.

    Args:
        update: which; the last where it is None.

    Raises:
        UserError: no run there, or no such checkpoint.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run} is not the folder of a run: it has no config.yaml")
    recipe = parse_recipe(yaml.safe_load(config.read_text(encoding="utf-8")), str(config))
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet")
    chosen = found[-1] if update is None else checkpoint_path(run, update)
    if chosen not in found:
        kept = ", ".join(str(int(path.name)) for path in found)
        raise UserError(f"{run} has no checkpoint of update {update}; it keeps those of {kept}")
    state, _ = read_facts(chosen)
    return export_run(run, recipe, read_average(chosen), state)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion export``."""
    parser.add_argument("run", type=Path, help="the folder that `distill` wrote")
    parser.add_argument("--checkpoint", type=int, metavar="UPDATE", help="which checkpoint (default: the last)")


def run(args: argparse.Namespace) -> int:
    """Export."""
    path = export_checkpoint(args.run, args.checkpoint)
    Console().print(f"the LoRA is at {path}", highlight=False, soft_wrap=True)
    return 0
