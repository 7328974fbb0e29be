"""The share of fresh noise between steps (a user's number, metadata or a preset), and how a run starts and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import torch

from ...flash_core.grid import MAX_FEW_STEPS, implied_shift, trailing_timesteps
from ...flash_core.lora import FlashMetadata, nearest_stochasticity
from ...flash_core.lora.metadata import PAPER_STOCHASTICITY
from ...flash_core.presets import Recognised
from ...flash_core.process import NUM_TIMESTEPS, FlowProcess, Process
from ..shared.model_facts import METADATA_KEY
from ..shared.process import process_of
from .presets import choose_preset, preset_text

TIMESTEP_TOLERANCE = 0.51  # a model's timesteps are whole numbers


@dataclass(frozen=True)
class Transitions:
    """How a run starts, goes from one noise level to the next, and ends.

    Attributes:
        stochasticity: the share of fresh noise in 0..1; or one for each transition.
        text: the share or the preset, with the reason, for the node's face; empty where there is nothing to tell.
        starts_at_sigma: see :attr:`~...flash_core.presets.Preset.starts_at_sigma`.
        second_order: see :attr:`~...flash_core.presets.Preset.second_order`.
        end: see :meth:`~...flash_core.presets.Preset.end`.
    """

    stochasticity: float | tuple[float, ...]
    text: str
    starts_at_sigma: bool = False
    second_order: bool = False
    end: tuple[float, float] | None = None


def preset_transitions(
    chosen: Recognised, given: float | None, process: Process, timesteps: Sequence[float], steps: int
) -> Transitions:
    """Return the preset's transitions, with the user's share of fresh noise in place of the preset's if one is given.

    Args:
        given: the user's number; None for ``auto``.
        timesteps: of the run.
        steps: step count of a full run, for the guidance that the text names.
    """
    preset = chosen.preset
    text = preset_text(chosen, steps)
    if given is not None and len(timesteps) > 1:
        text += f"; stochasticity {given:g} in place of it"
    share = preset.stochasticity(process, timesteps) if given is None else given
    return Transitions(share, text, preset.starts_at_sigma, preset.second_order and given is None, preset.end(process))


def choose_stochasticity(
    given: float | None, metadata: FlashMetadata | None, process: Process, timesteps: Sequence[float]
) -> Transitions:
    """Choose the share of fresh noise of a run without a preset.

    Args:
        given: the user's number; None for ``auto``, which takes the value of the metadata for the run's step count.
        metadata: of the LoRA in the model; None for a model without.
        timesteps: the noise levels of the run; with one there is no step to add noise at.
    """
    if len(timesteps) < 2:
        return Transitions(PAPER_STOCHASTICITY if given is None else given, "")
    if metadata is None or not metadata.stochasticity:
        if given is not None:
            return Transitions(given, f"stochasticity {given:g}")
        lack = "the model has no Flash metadata" if metadata is None else "the LoRA's metadata has no value"
        return Transitions(PAPER_STOCHASTICITY, f"stochasticity {PAPER_STOCHASTICITY:g}: the paper's, since {lack}")
    steps = trained_steps(metadata, process, timesteps)
    measured, listed = nearest_stochasticity(metadata.stochasticity, steps)
    source = f"the LoRA's metadata for {listed} steps"
    if listed != steps:
        source += f", the nearest to {steps}"
    if given is None:
        return Transitions(measured, f"stochasticity {measured:g}: {source}")
    if given == measured:
        return Transitions(given, f"stochasticity {given:g}")
    return Transitions(given, f"stochasticity {given:g} (auto: {measured:g}, {source})")


def trained_steps(metadata: FlashMetadata, process: Process, timesteps: Sequence[float]) -> int:
    """Return the step count of the trained grid that a run's timesteps are a part of.

    A run with ``denoise`` below 1, or a half of a split run, has fewer timesteps than its grid: 499, 249 belong to the
    grid of 4 steps. Timesteps of no trained grid count as a grid of their own.
    """
    if isinstance(process, FlowProcess):
        process = FlowProcess(implied_shift(metadata.timesteps) or process.shift)
    for steps in range(len(timesteps), MAX_FEW_STEPS + 1):
        grid = metadata.timesteps.get(steps) or trailing_timesteps(process, steps)
        for start in range(len(grid) - len(timesteps) + 1):
            part = grid[start : start + len(timesteps)]
            if all(abs(a - b) < TIMESTEP_TOLERANCE for a, b in zip(part, timesteps, strict=True)):
                return steps
    return len(timesteps)


def of_running_model(guider: Any, sigmas: Sequence[float], given: float | None, choice: str) -> Transitions:
    """Return the transitions of a run that has begun, for a sampler that was made without its model.

    Args:
        guider: ComfyUI's guider, with its ``model_patcher`` and the model as ``inner_model``.
        sigmas: the noise levels of the run in ComfyUI's convention, the last one only if it is above 0.
        given: the user's share of fresh noise; None for ``auto``.
        choice: of the preset, as :func:`~.presets.choose_preset` takes it.
    """
    patcher = getattr(guider, "model_patcher", None)  # guiders of other node packs may have none
    metadata: FlashMetadata | None = None if patcher is None else patcher.get_attachment(METADATA_KEY)
    sampling = guider.inner_model.model_sampling
    chosen = choose_preset(patcher, choice)
    if chosen is None and (metadata is None or not metadata.stochasticity):
        return choose_stochasticity(given, metadata, FlowProcess(1.0), sigmas)  # the process has no effect here
    if isinstance(sampling, comfy.model_sampling.CONST):
        timesteps = [sigma * NUM_TIMESTEPS for sigma in sigmas]
    else:
        timesteps = [float(sampling.timestep(torch.tensor(sigma))) for sigma in sigmas]
    if chosen is not None:
        return preset_transitions(chosen, given, process_of(sampling), [round(t, 3) for t in timesteps], len(timesteps))
    return choose_stochasticity(given, metadata, process_of(sampling), timesteps)
