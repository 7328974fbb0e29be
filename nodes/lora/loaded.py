"""The LoRAs that are in a MODEL: at most one of them is a Flash LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher

from ...flash_core.lora import LoraModule
from ..shared.model_facts import METADATA_KEY

LOADED_KEY = "flash_lora_stack"  # the ModelPatcher attachment that lists the LoRAs of the stacks before this node


@dataclass(frozen=True)
class Loaded:
    """A LoRA that is in the model.

    Attributes:
        name: the file's name.
        flash: True for the few-step LoRA.
        strength: as chosen.
        modules: its layers by common names.
    """

    name: str
    flash: bool
    strength: float
    modules: Mapping[str, LoraModule]


def check_single_flash(model: ModelPatcher, before: Sequence[Loaded], names: Sequence[str]) -> None:
    """Raise ValueError, with both names, where the model would have two Flash LoRAs.

    Args:
        model: the MODEL, whose metadata names the Flash LoRA of another loader.
        before: the LoRAs of earlier stacks.
        names: the Flash LoRAs to load now.
    """
    present = [one.name for one in before if one.flash]
    metadata = model.get_attachment(METADATA_KEY)
    if metadata is not None and not present:
        present = [f"{metadata.title!r} (already in the model)"]
    found = [*present, *names]
    if len(found) > 1:
        raise ValueError(
            f"These are two Flash LoRAs: {found[0]} and {found[1]}. A model works with only one. Keep one, and set the "
            "other to 'none' (or remove its loader)."
        )
