"""The preset of a run: the user's choice or the one that a loader recognised, and warnings about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher

from ...flash_core.families import name_of
from ...flash_core.presets import PRESETS, Recognised, in_words, preset_of
from ...flash_core.process import Process
from ..shared.inputs import AUTO
from ..shared.model_facts import METADATA_KEY, PRESET_KEY, family_name, model_bases
from ..shared.schema import count

CHOSEN = "your choice"
MOST_GUIDANCE = 2.0  # with a Flash LoRA; a little above 1 is used on purpose, 7 is left over from KSampler
FLUX_GUIDANCE = 3.5  # what ComfyUI gives a Flux model without FluxGuidance


def choose_preset(model: ModelPatcher | None, choice: str) -> Recognised | None:
    """Return the preset of a run, or None.

    Args:
        model: the MODEL; None where a sampler of another node pack hides it.
        choice: ``auto`` for the one that a loader recognised, or the title of a preset.

    Raises:
        ValueError: no preset has this title.
    """
    if choice == AUTO:
        found: Recognised | None = None if model is None else model.get_attachment(PRESET_KEY)
        return found
    preset = preset_of(choice)
    if preset is None:
        titles = ", ".join(one.title for one in PRESETS)
        raise ValueError(f"preset is {choice!r}; expected {AUTO}, or one of: {titles}.")
    recognised: Recognised | None = None if model is None else model.get_attachment(PRESET_KEY)
    steps = recognised.steps if recognised is not None and recognised.preset is preset else None
    return Recognised(preset, steps, CHOSEN)


def check_preset(chosen: Recognised, process: Process, model: ModelPatcher) -> None:
    """Raise ValueError where a preset for flow models meets a model with 1000 timesteps, or the other way round."""
    preset = chosen.preset
    if preset.kind == process.kind:
        return
    names = ", ".join(name_of(family) for family in preset.families)
    raise ValueError(
        f"The preset {preset.title} is for {names}; the model is {family_name(model)}, which is noised in another way. "
        f"Choose the preset of your LoRA, or '{AUTO}'."
    )


def warnings(chosen: Recognised, model: ModelPatcher, steps: int | None) -> list[str]:
    """Return WARNING lines on the model's family and on the step count (None: not used)."""
    preset, found = chosen.preset, []
    if not model_bases(model).intersection(preset.families):
        names = " and ".join(name_of(family) for family in preset.families)
        found.append(f"WARNING: {preset.title} is for {names}; the model is {family_name(model)}")
    if steps is not None and chosen.steps is not None and steps != chosen.steps:
        found.append(f"WARNING: {count(steps, 'step')}; this LoRA is made for {chosen.steps}")
    elif steps is not None and steps not in preset.steps:
        found.append(f"WARNING: {count(steps, 'step')}; {preset.title} is made for {steps_in_words(preset.steps)}")
    return found


def guidance_warnings(chosen: Recognised | None, steps: int, guidance: float, positive: Sequence[Any]) -> list[str]:
    """Return WARNING lines on guidance outside of the preset's: ComfyUI's cfg, and the guidance of a Flux prompt."""
    if chosen is None:
        return []
    preset, found = chosen.preset, []
    low, high = preset.guidance_for(steps)
    if not low <= guidance <= high:
        found.append(f"WARNING: guidance {guidance:g}; {preset.title} is made for {in_words((low, high))}")
    wanted = preset.distilled_guidance
    told = {float(options.get("guidance", FLUX_GUIDANCE)) for _, options in positive} if wanted is not None else set()
    found += [
        f"WARNING: the prompt's guidance is {one:g} (FluxGuidance); {preset.title} is made for {wanted:g}"
        for one in sorted(told)
        if wanted is not None and one != wanted
    ]
    return found


def lora_warnings(chosen: Recognised | None, model: ModelPatcher, guidance: float) -> list[str]:
    """Return lines for a run without a preset: no known few-step LoRA, or guidance that a Flash LoRA has built in."""
    if chosen is not None:
        return []
    if model.get_attachment(METADATA_KEY) is None:
        return [
            "NOTE: no few-step LoRA is known in this model. Load it with Flash LoRA Loader, or choose its preset. A "
            "few-step checkpoint needs neither."
        ]
    if guidance > MOST_GUIDANCE:
        return [f"WARNING: guidance {guidance:g}; the Flash LoRA has guidance built in. Set guidance to 1."]
    return []


def preset_text(chosen: Recognised, steps: int) -> str:
    """``SDXL-Lightning, 4 steps (by its file name): Euler, no fresh noise, guidance 1``, for the node's face."""
    preset = chosen.preset
    return f"{chosen.name} ({chosen.how}): {preset.noise_in_words}, guidance {in_words(preset.guidance_for(steps))}"


def steps_in_words(steps: Sequence[int]) -> str:
    """``4``, ``2, 4 or 8``, ``2 to 8``."""
    if len(steps) > 2 and list(steps) == list(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]} to {steps[-1]}"
    words = [str(step) for step in steps]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
