"""Turn a LoRA file into ComfyUI weight patches, for every file format and every model family.

ComfyUI's own loader knows some formats for some models; it skips the layers that it does not know. Here the model's
layers are listed under every name that they have, and a LoRA is applied whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import comfy.lora
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter

from ...flash_core.families import name_of
from ...flash_core.lora import (
    Difference,
    LoraFile,
    LoraModule,
    LoraReport,
    MatchReport,
    describe_base,
    flat_name,
    match,
    read_lora,
    report_on,
)
from ..shared.inputs import chosen_file
from ..shared.model_facts import describe_model, model_base

# The prefixes of layers' names in ComfyUI.
PREFIX = re.compile(
    r"(unet\.)?base_model\.model\.|lora_transformer_|diffusion_model\.|transformer\.|lora_unet_|lycoris_|unet\.|"
)


# A weight, or a slice of a fused one: (weight, (dimension, start, length), ...).
Target = str | tuple[Any, ...]


class LoraMismatch(ValueError):
    """Raised for a LoRA of another architecture; the message names both architectures."""


def read_chosen(name: str) -> LoraFile:
    """Read a file of ComfyUI's folders for LoRAs; ComfyUI's option ``--disable-mmap`` holds here too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no LoRA.
    """
    path = chosen_file("loras", name, "LoRA")
    return read_lora(path, mapped=not getattr(comfy.utils, "DISABLE_MMAP", False))


def model_layers(model: ModelPatcher) -> dict[str, Target]:
    """Map every name that ComfyUI knows for a layer (spelt as by :func:`flat_name`) to the layer's weight."""
    return _by_flat_name(comfy.lora.model_lora_keys_unet(model.model, {}))


def _by_flat_name(keys: dict[str, Target]) -> dict[str, Target]:
    layers: dict[str, Target] = {}
    for key, target in keys.items():
        if _weight(target).endswith(".weight"):
            prefix = PREFIX.match(key)
            assert prefix is not None  # PREFIX also matches the empty string
            layers.setdefault(flat_name(key[prefix.end() :]), target)
    return layers


def _find_layers(model: ModelPatcher, names: Collection[str]) -> dict[str, Target]:
    """Map some names to their layers' weights."""
    # ComfyUI lists a UNet's layers under both of their names, so this usual case is quick.
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {name: keys[key] for name in names if (key := f"lora_unet_{name}") in keys}
    if len(found) < len(names):
        layers = _by_flat_name(keys)
        found = {name: layers[name] for name in names if name in layers}
    return found


def layer_shape(model: ModelPatcher, target: Target) -> tuple[int, ...] | None:
    """The shape of a layer's weight, or of its slice of a fused weight; None if the model does not have the layer.

    ComfyUI's table of names holds the layers of a whole family, and some models of the family lack some of them.
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
        ``(match, layers)``: which layers fit, and the model's layers by name.
    """
    layers = _find_layers(model, file.modules)
    shapes = {name: layer_shape(model, target) for name, target in layers.items()}
    return match(file, {name: shape for name, shape in shapes.items() if shape is not None}), layers


def apply_lora(
    file: LoraFile, model: ModelPatcher, strength: float, allow_partial: bool = False
) -> tuple[ModelPatcher, LoraReport]:
    """Clone the model, add the LoRA's patches, and report the result.

    Args:
        file: the LoRA.
        model: the MODEL, which does not change.
        strength: 1 as in training.
        allow_partial: apply the layers that fit although others do not. Default: False.

    Raises:
        LoraMismatch: no layer fits; or, without ``allow_partial``, some layer does not fit.
    """
    met, layers = fit(file, model)
    whole, unfit = whole_patches(file.differences, model, _find_layers(model, _names(file.differences)))
    report = report_on(file, met, _notes(file, model), unfit)
    if not met.matched or not (report.complete or allow_partial):
        raise LoraMismatch(_refusal(file, model, report))
    patches: dict[Target, Any] = {layers[name]: lora_patch(name, file.modules[name]) for name in met.matched}
    patches |= whole
    patched = model.clone()
    applied = patched.add_patches(patches, strength)
    if len(applied) != len(met.matched) + len(whole):
        raise LoraMismatch(
            f"ComfyUI applied only {len(applied)} of the LoRA's {len(met.matched) + len(whole)} matching layers. "
            "Please report this file as a bug."
        )
    return patched, report


def lora_patch(name: str, module: LoraModule) -> LoRAAdapter:
    """Make ComfyUI's weight patch for one layer."""
    halves = {f"{name}.lora_up.weight": module.up, f"{name}.lora_down.weight": module.down}
    # The third argument is alpha: ComfyUI divides it by the rank.
    return LoRAAdapter.load(name, halves, module.scale * module.rank, None)


def whole_patches(
    differences: Sequence[Difference], model: ModelPatcher, layers: Mapping[str, Target]
) -> tuple[dict[Target, Any], list[Difference]]:
    """Make ComfyUI's patches for changes of whole weights and biases.

    Args:
        differences: of the file.
        model: the MODEL, or a text encoder's patcher.
        layers: its layers' weights by flat name.

    Returns:
        ``(patches, unfit)``: the patches by their targets, and the differences that the model has no place for.
    """
    patches: dict[Target, Any] = {}
    unfit = []
    for difference in differences:
        target = layers.get(flat_name(difference.path))
        if target is not None and difference.part == "bias":
            target = _bias(target)
        if target is None or layer_shape(model, target) != tuple(difference.values.shape):
            unfit.append(difference)
        else:
            patches[target] = ("diff", (difference.values,))
    return patches, unfit


def _bias(target: Target) -> Target | None:
    """Return the bias of a layer; None for a slice of a fused weight along its inputs, which have no bias."""
    name = f"{_weight(target).removesuffix('.weight')}.bias"
    if isinstance(target, str):
        return name
    return (name, *target[1:]) if target[1] is None or target[1][0] == 0 else None


def _names(differences: Sequence[Difference]) -> set[str]:
    return {flat_name(difference.path) for difference in differences}


def _notes(file: LoraFile, model: ModelPatcher) -> tuple[str, ...]:
    """Warn of a LoRA for another base of the same shapes, such as PixArt-alpha and PixArt-Sigma."""
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
            f"This LoRA has no layer for the diffusion model, only {kinds}. Load it with ComfyUI's Load LoRA, which "
            "patches the CLIP too."
        )
    left_out = "; ".join(item.words() for item in report.left_out)
    advice = "Load the checkpoint that the LoRA was made for, or a LoRA that was made for this model."
    if report.matched:
        advice += " To load only the layers that fit, turn on allow_partial."
    return (
        f"This LoRA does not fit this model. It is for {describe_base(file)}; the model is {describe_model(model)}. "
        f"{report.matched} of its {report.layers} layers fit. These do not: {left_out}. {advice}"
    )
