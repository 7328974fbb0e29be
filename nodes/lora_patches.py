"""From a LoRA file to ComfyUI weight patches: every dialect, every family, and a count of what fits.

ComfyUI's own loader knows some dialects for some models, loads what it recognises and logs the rest. Here the file's
layers are named once, the model's layers are listed under every name they have, and a LoRA fits whole or not at all.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
from comfy.model_patcher import ModelPatcher
from torch import Tensor, tensor

from ..flash_core.lora import LoraFile, MatchReport, describe_base, flat_name, match

# What ComfyUI puts before a layer's name, longest first.
PREFIXES = (
    "unet.base_model.model.",
    "base_model.model.",
    "lora_transformer_",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lycoris_",
    "unet.",
)

# A weight, or a slice of a fused one: (weight, (dimension, start, length), ...).
Target = str | tuple[Any, ...]


class LoraMismatch(ValueError):
    """A LoRA for another architecture; the message names both."""


def model_layers(model: ModelPatcher) -> dict[str, Target]:
    """Where each layer of the model lies, by every name ComfyUI knows for it (in :func:`flat_name`'s spelling)."""
    layers: dict[str, Target] = {}
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        weight = target if isinstance(target, str) else target[0]
        if weight.endswith(".weight"):
            prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
            layers.setdefault(flat_name(key[len(prefix) :]), target)
    return layers


def layer_shape(weights: dict[str, Tensor], target: Target) -> tuple[int, ...]:
    """The shape of a layer's weight, or of its slice of a fused one."""
    if isinstance(target, str):
        return tuple(weights[target].shape)
    shape = list(weights[target[0]].shape)
    dimension, _, length = target[1]
    shape[dimension] = length
    return tuple(shape)


def describe_model(model: ModelPatcher) -> str:
    """The model's family in words, with the width that tells UNets apart."""
    config = model.model.model_config
    family = vars(type(config)).get("family", type(config).__name__)
    width = config.unet_config.get("context_dim")
    return f"{family} (attn2 reads {width} channels)" if width else family


def fit(file: LoraFile, model: ModelPatcher) -> tuple[MatchReport, dict[str, Target]]:
    """Compare a LoRA with a model, layer by layer.

    Returns:
        The report, and the model's layers by name.
    """
    layers = model_layers(model)
    weights = model.model.state_dict()
    shapes = {name: layer_shape(weights, layers[name]) for name in file.modules if name in layers}
    return match(file, shapes), layers


def apply_lora(file: LoraFile, model: ModelPatcher, strength: float) -> tuple[ModelPatcher, MatchReport]:
    """A clone of the model with the LoRA's patches.

    Raises:
        LoraMismatch: not every layer of the file has its place in the model.
    """
    report, layers = fit(file, model)
    if not report.complete or not report.total:
        example = next(iter([*report.mismatched, *report.missing, *file.text_encoder]), "none")
        raise LoraMismatch(
            f"This LoRA does not fit this model. It is for {describe_base(file)}; "
            f"the model is {describe_model(model)}. {len(report.matched)} of its {report.total} layers fit "
            f"(one that does not: {example}). Load the checkpoint that the LoRA was made for, or a LoRA that was "
            "made for this model."
        )
    keys: dict[str, Tensor] = {}
    for name, module in file.modules.items():
        keys[f"{name}.lora_down.weight"] = module.down
        keys[f"{name}.lora_up.weight"] = module.up
        keys[f"{name}.alpha"] = tensor(module.scale * module.rank)  # known or not: ComfyUI computes alpha / rank
    patches = comfy.lora.load_lora(keys, {name: layers[name] for name in file.modules})
    patched = model.clone()
    applied = patched.add_patches(patches, strength)
    if len(applied) != report.total:
        raise LoraMismatch(
            f"ComfyUI applied {len(applied)} of the LoRA's {report.total} layers; please report this file."
        )
    return patched, report


def describe_fit(file: LoraFile, report: MatchReport) -> str:
    """What was loaded, in a few lines for the user."""
    ranks = ", ".join(str(rank) for rank in file.ranks)
    if file.alpha_source == "unknown":
        alpha = "unknown (scale 1 is used; if the picture is overdone, lower the strength to alpha / rank)"
    else:
        alpha = ", ".join(f"{value:g}" for value in file.alphas)
    lines = [
        f"made for: {describe_base(file)}",
        f"rank: {ranks}   alpha: {alpha}",
        f"matched: {len(report.matched)}/{report.total} layers   dialect: {file.dialect}",
    ]
    if file.text_encoder:
        lines.append(f"left out: {len(file.text_encoder)} text encoder layers (this loader patches the MODEL only)")
    if file.unknown:
        lines.append(f"left out: {len(file.unknown)} unknown keys, e.g. {file.unknown[0]}")
    metadata = file.metadata
    if metadata is None:
        lines.append("no Flash metadata: the sampler uses trailing timesteps")
    else:
        steps = ", ".join(str(count) for count in sorted(metadata.timesteps))
        lines.append(
            f"trained for: {steps} steps (best: {metadata.steps}), guidance {metadata.guidance:g}, {metadata.task}"
        )
    return "\n".join(lines)
