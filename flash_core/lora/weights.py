"""What a LoRA file holds, independent of the dialect it was written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .metadata import FlashMetadata

# Where alpha was found: in the file's keys, its header, the JSON beside it, the table of published files, or nowhere.
AlphaSource: TypeAlias = Literal["file", "header", "adapter_config", "published", "unknown"]


def flat_name(path: str) -> str:
    """A module path with underscores for dots: the one spelling that every dialect can be brought to.

    Some dialects only keep this form (``lora_unet_down_blocks_0_...``), from which the dots can't be recovered without
    the model, while no two modules of a diffusion model share it.
    """
    return path.replace(".", "_")


def computable(dtype: torch.dtype) -> torch.dtype:
    """The type in which results computed from numbers of ``dtype`` are kept: float16 for those of 8 bits."""
    return torch.float16 if dtype.itemsize == 1 else dtype


@dataclass(frozen=True)
class LoraModule:
    """The update ``scale * up @ down`` of one layer.

    Attributes:
        path: the module's path as the file tells it, dotted where known.
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
        alpha: the update is scaled by ``alpha / r``; None where nothing tells it, and then the scale is 1.
    """

    path: str
    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        """``alpha / r``, or 1 where alpha is unknown."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the update: (out, in) or (out, in, kh, kw)."""
        return (int(self.up.shape[0]), *(int(size) for size in self.down.shape[1:]))

    def update(self) -> Tensor:
        """``scale * up @ down`` in float32, of :attr:`shape`: what is added to the layer's weight."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        return (self.scale * up @ down).reshape(self.shape)

    @property
    def values(self) -> int:
        """How many numbers the file holds for it."""
        return self.down.numel() + self.up.numel()


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, read.

    Attributes:
        modules: the denoiser's layers by :func:`flat_name`.
        text_encoder: the text encoders' layers by prefix and flat name, kept apart.
        unknown: keys that belong to no layer we can name.
        embeddings: keys of textual-inversion embeddings that were packed into the file.
        dialect: how the keys were spelt.
        alpha_source: where alpha came from.
        metadata: what a Flash LoRA says of itself, or is known of a published one, or None.
        header: the file's other header strings.
        published: the published file it was recognised as, or None.
        notes: what was done to its layers to fit stock models, in words.
    """

    modules: Mapping[str, LoraModule]
    dialect: str
    alpha_source: AlphaSource
    text_encoder: Mapping[str, LoraModule] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    metadata: FlashMetadata | None = None
    header: Mapping[str, str] = field(default_factory=dict)
    published: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def alphas(self) -> tuple[float, ...]:
        """The distinct known alphas, ascending."""
        return tuple(sorted({module.alpha for module in self.modules.values() if module.alpha is not None}))

    @property
    def scales(self) -> tuple[float, ...]:
        """The distinct scales, ascending."""
        return tuple(sorted({module.scale for module in self.modules.values()}))
