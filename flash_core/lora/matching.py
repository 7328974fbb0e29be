"""Compare a LoRA with a model: count the layers that match, and name both families if the LoRA does not fit."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ..families import name_of, of_text_width, of_transformer_width
from .weights import LoraFile, LoraModule


@dataclass(frozen=True)
class MatchReport:
    """The result of comparing a LoRA's layers with a model's layers.

    Attributes:
        matched: layers of the file that the model has.
        missing: layers of the file that the model lacks, sorted.
        mismatched: layers that the model has with another shape, sorted.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def total(self) -> int:
        """The number of layers of the file."""
        return len(self.matched) + len(self.missing) + len(self.mismatched)

    @property
    def complete(self) -> bool:
        """True if every layer of the file matched."""
        return not self.missing and not self.mismatched


def match(file: LoraFile, layers: dict[str, tuple[int, ...]] | Collection[str]) -> MatchReport:
    """Compare a file with a model's layers.

    Args:
        layers: the model's layer names (:func:`~.weights.flat_name`), with the shapes of their weights where known:
            a layer whose update has another shape counts as mismatched.
    """
    shapes = layers if isinstance(layers, dict) else dict.fromkeys(layers)
    matched, missing, mismatched = [], [], []
    for name, module in file.modules.items():
        if name not in shapes:
            missing.append(name)
            continue
        shape = shapes[name]
        if shape is not None and not same_weight(shape, module.shape):
            mismatched.append(name)
        else:
            matched.append(name)
    return MatchReport(tuple(sorted(matched)), tuple(sorted(missing)), tuple(sorted(mismatched)))


def same_weight(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether two shapes hold the same weight: a linear layer and a 1x1 convolution do."""
    return one[0] == other[0] and one[1:2] == other[1:2] and math.prod(one) == math.prod(other)


def base_of(file: LoraFile) -> str | None:
    """Return the key of the family that the LoRA was made for (``sd15``, ``sdxl``, ...); None if it is not certain."""
    if file.metadata is not None:
        return file.metadata.base
    return _by_layers(file)[0] or None


def describe_base(file: LoraFile) -> str:
    """Return the name of the family that the LoRA was made for: from its metadata, else from its layers."""
    if file.published is not None and file.metadata is not None:
        return f"{name_of(file.metadata.base)} (it is {file.published} by its layers and their shapes)"
    if file.metadata is not None:
        return f"{name_of(file.metadata.base)} (by its own metadata)"
    return _by_layers(file)[1]


def _by_layers(file: LoraFile) -> tuple[str, str]:
    """Return the family's key, empty if it is not certain, and its description."""
    names = file.modules
    if any(name.startswith(("single_transformer_blocks_", "single_blocks_", "double_blocks_")) for name in names):
        return "flux", name_of("flux")
    if any(name.startswith("joint_blocks_") or "_add_k_proj" in name for name in names):
        return _sd3(file)
    if any(name.startswith("blocks_") and name.endswith(("_attn_qkv", "_q_linear", "_kv_linear")) for name in names):
        return _pixart(file)
    if any(name.startswith("transformer_blocks_") for name in names):
        # PixArt's blocks have a self- and a cross-attention, attn1 and attn2; SD3's have one joint attn, SD3.5 medium's
        # first ones attn and attn2.
        joint = any("_attn_to_" in name or "_norm1_" in name or "_ff_context_" in name for name in names)
        attention = any("_attn1_" in name or "_attn2_" in name for name in names)
        return _pixart(file) if attention and not joint else _sd3(file)
    first = next((module for name, module in names.items() if name.endswith("attn2_to_k")), None)
    if first is None:
        deep = any("_transformer_blocks_9_" in name for name in names)  # only SDXL stacks ten
        return ("sdxl", name_of("sdxl")) if deep else ("", "an unknown model (no cross-attention layer in the file)")
    width = _width(first)
    family = of_text_width(width, channels=first.up.shape[0])
    key, name = ("", "an unknown model") if family is None else (family.key, family.name)
    return key, f"{name} (attn2 reads {width} channels)"


def _sd3(file: LoraFile) -> tuple[str, str]:
    if any("_attn2_" in name for name in file.modules):
        return "sd35", f"{name_of('sd35')} medium (its first blocks have a second attention)"
    unknown = f"a transformer like {name_of('sd3')}"
    width = next((_width(module) for name, module in file.modules.items() if "_attn_" in name), None)
    if width is None:
        return "", unknown
    found = of_transformer_width(width)
    words = " or ".join(family.sized(width) for family in found) or unknown
    return (found[0].key if len(found) == 1 else ""), f"{words} ({width} channels wide)"


def _width(module: LoraModule) -> int:
    return int(module.down.shape[1])


def _pixart(file: LoraFile) -> tuple[str, str]:
    if any("resolution_embedder" in name or "csize_embedder" in name for name in file.modules):
        return "pixart", f"{name_of('pixart')} at 1024 pixels (it embeds the picture's size)"
    return "", f"{name_of('pixart')} or {name_of('pixart-sigma')} (both have the same layers)"
