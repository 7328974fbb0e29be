"""From a LoRA file to ComfyUI weight patches: every dialect, every family, and a count of what fits.

ComfyUI's own loader knows some dialects for some models, loads what it recognises and logs the rest. Here the file's
layers are named once, the model's layers are listed under every name they have, and a LoRA fits whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import comfy.lora
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ...flash_core.families import name_of
from ...flash_core.lora import LoraFile, LoraModule, LoraReport, MatchReport, describe_base, flat_name, match, report_on
from ..shared.model_facts import describe_model, model_base

# What ComfyUI puts before a layer's name.
PREFIX = re.compile(
    r"(unet\.)?base_model\.model\.|lora_transformer_|diffusion_model\.|transformer\.|lora_unet_|lycoris_|unet\.|"
)


# A weight, or a slice of a fused one: (weight, (dimension, start, length), ...).
Target = str | tuple[Any, ...]


class LoraMismatch(ValueError):
    """A LoRA for another architecture; the message names both."""


def model_layers(model: ModelPatcher) -> dict[str, Target]:
    """Where each layer of the model lies, by every name ComfyUI knows for it (in :func:`flat_name`'s spelling)."""
    return _by_flat_name(comfy.lora.model_lora_keys_unet(model.model, {}))


def _by_flat_name(keys: dict[str, Target]) -> dict[str, Target]:
    layers: dict[str, Target] = {}
    for key, target in keys.items():
        if _weight(target).endswith(".weight"):
            layers.setdefault(flat_name(key[PREFIX.match(key).end() :]), target)
    return layers


def _find_layers(model: ModelPatcher, names: Collection[str]) -> dict[str, Target]:
    """Where some layers lie. ComfyUI lists a UNet's under both of their names already: the usual case is quick."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {name: keys[key] for name in names if (key := f"lora_unet_{name}") in keys}
    if len(found) < len(names):
        layers = _by_flat_name(keys)
        found = {name: layers[name] for name in names if name in layers}
    return found


def layer_shape(model: ModelPatcher, target: Target) -> tuple[int, ...] | None:
    """The shape of a layer's weight, or of its slice of a fused one; None where the model lacks it.

    ComfyUI's table of names is of a whole family: it lists layers that some of its models do not have.
    """
    try:
        shape = list(comfy.utils.get_attr(model.model, _weight(target)).shape)
    except AttributeError:
        return None
    if not isinstance(target, str) and target[1] is not None:  # else the whole weight, perhaps reordered
        dimension, _, length = target[1]
        shape[dimension] = length
    return tuple(shape)


def _weight(target: Target) -> str:
    return target if isinstance(target, str) else target[0]


def fit(file: LoraFile, model: ModelPatcher) -> tuple[MatchReport, dict[str, Target]]:
    """Compare a LoRA with a model, layer by layer.

    Returns:
        How they met, and the model's layers by name.
    """
    layers = _find_layers(model, file.modules)
    shapes = {name: layer_shape(model, target) for name, target in layers.items()}
    return match(file, {name: shape for name, shape in shapes.items() if shape is not None}), layers


def apply_lora(
    file: LoraFile, model: ModelPatcher, strength: float, allow_partial: bool = False
) -> tuple[ModelPatcher, LoraReport]:
    """A clone of the model with the LoRA's patches, and the report of what it got.

    Args:
        strength: 1 is what the LoRA was trained for.
        allow_partial: whether a LoRA of which only a part fits is applied with that part.

    Raises:
        LoraMismatch: nothing of the file has its place in the model; or not everything, unless ``allow_partial``.
    """
    met, layers = fit(file, model)
    report = report_on(file, met, _notes(file, model))
    if not met.matched or not (report.complete or allow_partial):
        raise LoraMismatch(_refusal(file, model, report))
    patches = {}
    for name in met.matched:
        patches[layers[name]] = lora_patch(name, file.modules[name])
    patched = model.clone()
    applied = patched.add_patches(patches, strength)
    if len(applied) != len(met.matched):
        raise LoraMismatch(
            f"ComfyUI applied {len(applied)} of the LoRA's {len(met.matched)} matching layers; please report this file."
        )
    return patched, report


def lora_patch(name: str, module: LoraModule) -> LoRAAdapter:
    """One layer's update as ComfyUI's weight patch."""
    halves = {f"{name}.lora_up.weight": module.up, f"{name}.lora_down.weight": module.down}
    # Whether alpha is known or not: ComfyUI divides it by the rank.
    return LoRAAdapter.load(name, halves, module.scale * module.rank, None)


def _notes(file: LoraFile, model: ModelPatcher) -> tuple[str, ...]:
    """A LoRA that fits by its shapes and was made for another base all the same: PixArt-Sigma has alpha's layers."""
    made_for = file.metadata.base if file.metadata is not None else None
    base = model_base(model)
    if made_for is None or base is None or made_for == base:
        return ()
    return (
        f"WARNING: made for {name_of(made_for)}, while the model is {name_of(base)}; its layers fit, the pictures may "
        "suffer",
    )


def _refusal(file: LoraFile, model: ModelPatcher, report: LoraReport) -> str:
    if not file.modules:
        kinds = f"{len(file.text_encoder)} text encoder layers, e.g. {next(iter(file.text_encoder))}"
        return (
            f"This LoRA holds nothing for the diffusion model: only {kinds}. Load it with ComfyUI's Load LoRA, which "
            "patches the CLIP as well."
        )
    left_out = "; ".join(item.words() for item in report.left_out)
    advice = "Load the checkpoint that the LoRA was made for, or a LoRA that was made for this model."
    if report.matched:
        advice += " To load the part that fits all the same, turn on allow_partial."
    return (
        f"This LoRA does not fit this model. It is for {describe_base(file)}; the model is {describe_model(model)}. "
        f"{report.matched} of its {report.layers} layers fit. Left out would be: {left_out}. {advice}"
    )
