"""Does this LoRA fit this model? Count what matches, and name both architectures when it does not."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from .weights import LoraFile, LoraModule

# The width that the first cross-attention reads (the text encoder's) tells UNet families apart.
_UNET_BY_TEXT_WIDTH = {
    768: ("sd15", "SD 1.5"),
    1024: ("sd21", "SD 2"),
    2048: ("sdxl", "SDXL"),
    1280: ("", "the SDXL refiner"),
    128: ("flash-demo", "the Flash demo"),
}
# Of the UNets that read SD 2's text the x4 upscaler's levels are 512 and 1024 channels wide, SD 2's 320, 640 and 1280.
_SD2_TEXT, _X4_WIDTHS = 1024, (512, 1024)
# The width of the image stream tells SD3's sizes apart: 64 channels a head, as many blocks as heads.
_SD3_BY_WIDTH = {1536: "SD3 medium or SD3.5 medium", 2432: "SD3.5 large"}


@dataclass(frozen=True)
class MatchReport:
    """How a LoRA's layers meet a model's.

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
        """All layers of the file."""
        return len(self.matched) + len(self.missing) + len(self.mismatched)

    @property
    def complete(self) -> bool:
        """Whether every layer of the file matched."""
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
    """Whether two shapes are of one weight: a linear layer and a 1x1 convolution hold the same numbers."""
    return one[0] == other[0] and one[1:2] == other[1:2] and math.prod(one) == math.prod(other)


def base_of(file: LoraFile) -> str | None:
    """The base as Flash metadata names it (``sd15``, ``sdxl``, ...), where the file leaves no doubt; else None."""
    if file.metadata is not None:
        return file.metadata.base
    return _by_layers(file)[0] or None


def describe_base(file: LoraFile) -> str:
    """The base a LoRA was made for, in words: from what it says or is known to be, else from its layers."""
    if file.published is not None and file.metadata is not None:
        return f"{file.metadata.base} (it is {file.published} by its layers and their shapes)"
    if file.metadata is not None:
        return f"{file.metadata.base} (by its own metadata)"
    return _by_layers(file)[1]


def _by_layers(file: LoraFile) -> tuple[str, str]:
    """The base's key, empty where in doubt, and its description."""
    names = file.modules
    if any(name.startswith(("single_transformer_blocks_", "single_blocks_", "double_blocks_")) for name in names):
        return "flux", "Flux"
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
        return ("sdxl", "SDXL") if deep else ("", "an unknown model (no cross-attention layer in the file)")
    width = _width(first)
    base, words = _UNET_BY_TEXT_WIDTH.get(width, ("", "an unknown model"))
    if width == _SD2_TEXT and first.up.shape[0] in _X4_WIDTHS:
        base, words = "sd_x4", "the SD x4 upscaler"
    return base, f"{words} (attn2 reads {width} channels)"


def _sd3(file: LoraFile) -> tuple[str, str]:
    if any("_attn2_" in name for name in file.modules):
        return "sd35", "SD3.5 medium (its first blocks have a second attention)"
    width = next((_width(module) for name, module in file.modules.items() if "_attn_" in name), None)
    if width is None:
        return "", "a transformer like SD3"
    words = _SD3_BY_WIDTH.get(width, "a transformer like SD3")
    return ("sd35" if words == "SD3.5 large" else ""), f"{words} ({width} channels wide)"


def _width(module: LoraModule) -> int:
    return int(module.down.shape[1])


def _pixart(file: LoraFile) -> tuple[str, str]:
    if any("resolution_embedder" in name or "csize_embedder" in name for name in file.modules):
        return "pixart", "PixArt-alpha at 1024 pixels (it embeds the picture's size)"
    return "", "PixArt (alpha and Sigma have the same layers)"
