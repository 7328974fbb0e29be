"""What a run hands over: the LoRA, which explains itself in its header, and a model card."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from rich.console import Console
from torch import Tensor

from ... import __version__
from ...flash_core.grid import MAX_FEW_STEPS, trailing_timesteps
from ...flash_core.lora import FlashMetadata, LoraModule, write_lora
from ...flash_core.process import FlowProcess
from ..config import Recipe, parse_recipe
from ..distill.checkpoint import TrainingState, checkpoint_path, checkpoints, read_average, read_facts
from ..errors import UserError
from ..teachers import family, outline_teacher
from .card_usage import BEST_STEPS, LORA
from .model_card import model_card


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


def export_run(run: Path, recipe: Recipe, average: Mapping[str, Tensor], state: TrainingState) -> Path:
    """Write the LoRA and the card.

    Args:
        average: the student's averaged parameters by their names in the network.
        state: where the run is.
    """
    teacher = family(recipe.model.family)
    outline = outline_teacher(recipe.model, recipe.data.resolution)
    process = outline.denoiser.process
    modules = lora_modules(average, recipe.lora.alpha)
    metadata = FlashMetadata(
        base=teacher.base,
        prediction=process.prediction,
        process="flow" if isinstance(process, FlowProcess) else "vp",
        task=recipe.task.name,
        timesteps={steps: tuple(trailing_timesteps(process, steps)) for steps in range(1, MAX_FEW_STEPS + 1)},
        steps=BEST_STEPS,
        title=f"Flash LoRA of {outline.name}",
        teacher=outline.name,
        teacher_hash=state.teacher_hash,
        recipe_hash=recipe.digest(),
        training={
            "updates": str(state.update),
            "samples": str(state.position),
            "trainer": f"flash-diffusion {__version__}",
        }
        | ({"style_lora": recipe.model.styles} if recipe.model.style_lora else {})
        | ({"control": outline.control.title} if outline.control is not None else {})
        | ({"image_adapter": recipe.model.image_adapter.title} if recipe.model.image_adapter is not None else {}),
    )
    path = run / LORA
    write_lora(path, modules, metadata, transformer=teacher.transformer, dtype=getattr(torch, recipe.lora.dtype))
    (run / "README.md").write_text(model_card(run, recipe, modules, metadata, process, state), encoding="utf-8")
    return path


def lora_modules(parameters: Mapping[str, Tensor], alpha: float | None) -> dict[str, LoraModule]:
    """Pair up an adapter's parameters, ``<path>.lora_A.<role>.weight`` and its ``lora_B``, by path."""
    modules: dict[str, LoraModule] = {}
    for name, down in parameters.items():
        path, marker, rest = name.partition(".lora_A.")
        if marker:
            up = parameters[f"{path}.lora_B.{rest}"]
            modules[path] = LoraModule(path, down, up, float(down.shape[0]) if alpha is None else alpha)
    return modules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``flash-diffusion export``."""
    parser.add_argument("run", type=Path, help="the folder that `distill` wrote")
    parser.add_argument("--checkpoint", type=int, metavar="UPDATE", help="which checkpoint (default: the last)")


def run(args: argparse.Namespace) -> int:
    """Export."""
    path = export_checkpoint(args.run, args.checkpoint)
    Console().print(f"the LoRA is at {path}", highlight=False, soft_wrap=True)
    return 0
