"""``flash-diffusion export``: write the LoRA of a run's checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ..errors import UserError
from ..export.export import export_run
from ..recipes import load_run_recipe
from .checkpoint import checkpoint_path, checkpoints, damage, last_intact, read_average, read_facts


def export_checkpoint(run: Path, update: int | None = None) -> Path:
    """Write the LoRA and the model card of a run from one of its checkpoints, and return the LoRA's path.

    Args:
        update: the checkpoint's update; None is the last intact checkpoint.

    Raises:
        UserError: ``run`` is not the folder of a run, or has no such intact checkpoint.
    """
    recipe = load_run_recipe(run)
    chosen = last_intact(run) if update is None else checkpoint_path(run, update)
    if chosen is None:
        raise UserError(f"{run} has no checkpoint yet; wait for its first one, or start it again with --resume")
    found = checkpoints(run)
    kept = ", ".join(str(int(path.name)) for path in found) or "none"
    if chosen not in found:
        raise UserError(f"{run} has no checkpoint of update {update}; it has checkpoints of the updates {kept}")
    if reason := damage(chosen):
        raise UserError(f"{chosen} is damaged: {reason}. Choose another --checkpoint of the updates {kept}")
    state, _ = read_facts(chosen)
    return export_run(run, recipe, read_average(chosen), state)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion export``."""
    parser.add_argument("run", type=Path, help="folder of the run, as `flash-diffusion distill` wrote it")
    parser.add_argument(
        "--checkpoint", type=int, metavar="UPDATE", help="update of the checkpoint (default: the last intact one)"
    )


def run(args: argparse.Namespace) -> int:
    """Export a checkpoint."""
    path = export_checkpoint(args.run, args.checkpoint)
    Console().print(f"the LoRA is at {path}", highlight=False, soft_wrap=True)
    return 0
