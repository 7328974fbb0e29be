"""Export a run: the LoRA with its metadata, and a model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ... import __version__
from ...flash_core.grid import MAX_FEW_STEPS, trailing_timesteps
from ...flash_core.lora import FlashMetadata, LoraModule, write_lora
from ..config import Recipe
from ..evaluate.tuning.stored import read_tuned
from ..files import write_text_whole
from ..recipes import LORA_FILE
from ..teachers import family
from .base_facts import read_base_facts
from .card_usage import BEST_STEPS
from .model_card import model_card
from .training_state import TrainingState

logger = logging.getLogger(__name__)


def export_run(run: Path, recipe: Recipe, average: Mapping[str, Tensor], state: TrainingState) -> Path:
    """Write the LoRA and the card.

    Args:
        average: the student's averaged parameters, by name.
        state: the state of the run.
    """
    teacher = family(recipe.model.family)
    facts = read_base_facts(run, recipe)
    process = facts.process
    modules = lora_modules(average, recipe.lora.alpha)
    metadata = FlashMetadata(
        base=teacher.base,
        prediction=process.prediction,
        process=process.kind,
        task=recipe.task.name,
        timesteps={steps: tuple(trailing_timesteps(process, steps)) for steps in range(1, MAX_FEW_STEPS + 1)},
        steps=BEST_STEPS,
        stochasticity=measured_stochasticity(run, state) or stochasticity_of(recipe),
        title=f"Flash LoRA of {facts.name}",
        teacher=facts.name,
        architecture=facts.architecture,
        teacher_hash=state.teacher_hash,
        recipe_hash=recipe.digest(),
        training={
            "updates": str(state.update),
            "samples": str(state.position),
            "trainer": f"flash-diffusion {__version__}",
        }
        | ({"start": Path(recipe.lora.start).name} if recipe.lora.start is not None else {})
        | ({"base_weights": recipe.model.storage} if recipe.model.storage is not None else {})
        | ({"style_lora": recipe.model.styles} if recipe.model.style_lora else {})
        | ({"control": facts.control.title} if facts.control is not None else {})
        | ({"image_adapter": recipe.model.image_adapter.title} if recipe.model.image_adapter is not None else {}),
    )
    path = run / LORA_FILE
    write_lora(path, modules, metadata, transformer=teacher.transformer, dtype=getattr(torch, recipe.lora.dtype))
    write_text_whole(run / "README.md", model_card(run, recipe, modules, metadata, facts, state))
    return path


def measured_stochasticity(run: Path, state: TrainingState) -> dict[int, float]:
    """Return {step count: share of fresh noise} as measured by ``evaluate --tune-sampler``; empty if it was not."""
    tuned = read_tuned(run)
    if tuned is None:
        return {}
    if tuned.updates != str(state.update):
        logger.warning(
            "The stochasticity was measured at update %s, and this LoRA is of update %s; measure it again with "
            "`flash-diffusion evaluate --run %s --tune-sampler --write`.",
            tuned.updates or "unknown",
            state.update,
            run,
        )
    return dict(tuned.stochasticity)


def stochasticity_of(recipe: Recipe) -> dict[int, float]:
    """Return {step count: share of fresh noise between steps}; empty for the paper's 1."""
    share = recipe.sampler.stochasticity
    return {} if share == 1 else dict.fromkeys(range(1, MAX_FEW_STEPS + 1), share)


def lora_modules(parameters: Mapping[str, Tensor], alpha: float | None) -> dict[str, LoraModule]:
    """Pair an adapter's parameters, ``<path>.lora_A.<role>.weight`` and its ``lora_B``, by path."""
    modules: dict[str, LoraModule] = {}
    for name, down in parameters.items():
        path, marker, rest = name.partition(".lora_A.")
        if marker:
            up = parameters[f"{path}.lora_B.{rest}"]
            modules[path] = LoraModule(path, down, up, float(down.shape[0]) if alpha is None else alpha)
    return modules
