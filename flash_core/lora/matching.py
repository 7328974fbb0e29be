"""Does this LoRA fit this model? Count what matches, and name both architectures when it does not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .weights import LoraFile

# The width that the first cross-attention reads (the text encoder's) tells UNet families apart.
_UNET_BY_TEXT_WIDTH = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL", 128: "the Flash demo"}


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
            a layer whose (out, in) differ from the file's counts as mismatched.
    """
    shapes = layers if isinstance(layers, dict) else dict.fromkeys(layers)
    matched, missing, mismatched = [], [], []
    for name, module in file.modules.items():
        if name not in shapes:
            missing.append(name)
            continue
        shape = shapes[name]
        if shape is not None and (shape[0], shape[1]) != (module.up.shape[0], module.down.shape[1]):
            mismatched.append(name)
        else:
            matched.append(name)
    return MatchReport(tuple(sorted(matched)), tuple(sorted(missing)), tuple(sorted(mismatched)))


def describe_base(file: LoraFile) -> str:
    """The base a LoRA was made for, in words: from its metadata, else from its layers' names and widths."""
    if file.metadata is not None:
        return f"{file.metadata.base} (by its own metadata)"
    names = file.modules
    if any("single_transformer_blocks" in name for name in names):
        return "Flux"
    if any("add_k_proj" in name or "joint_blocks" in name for name in names):
        return "SD3"
    if any(name.startswith("transformer_blocks_") for name in names):
        # PixArt's blocks have a self- and a cross-attention, attn1 and attn2; SD3's have one joint attn.
        return "PixArt" if any("_attn1_" in name or "_attn2_" in name for name in names) else "SD3"
    width = next((int(m.down.shape[1]) for name, m in names.items() if name.endswith("attn2_to_k")), None)
    if width is None:
        return "an unknown model (no cross-attention layer in the file)"
    return f"{_UNET_BY_TEXT_WIDTH.get(width, 'an unknown model')} (attn2 reads {width} channels)"
