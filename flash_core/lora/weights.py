"""The content of a LoRA file, independent of its dialect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .metadata import FlashMetadata

# Where alpha was found: in the file's keys, its header, the JSON beside it, the table of published files, or nowhere.
AlphaSource: TypeAlias = Literal["file", "header", "adapter_config", "published", "unknown"]


def flat_name(path: str) -> str:
    """Return a module path with underscores for dots: the spelling that every dialect can be converted to.

    Some dialects have this form only (``lora_unet_down_blocks_0_...``); the dots can't be recovered without the model.
    No two modules of a diffusion model have the same flat name.
    """
    return path.replace(".", "_")


def computable(dtype: torch.dtype) -> torch.dtype:
    """Return the type for results computed from ``dtype``: float16 for 8-bit types, else ``dtype``."""
    return torch.float16 if dtype.itemsize == 1 else dtype


@dataclass(frozen=True)
class LoraModule:
    """The update ``scale * up @ down`` of one layer.

    Attributes:
        path: the module's path as in the file, dotted if the file has dots.
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
        alpha: the update is scaled by ``alpha / r``; None if unknown, and then the scale is 1.
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
        """Return ``scale * up @ down`` in float32, of :attr:`shape`: the change of the layer's weight."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        return (self.scale * up @ down).reshape(self.shape)

    @property
    def values(self) -> int:
        """The number of values of both halves."""
        return self.down.numel() + self.up.numel()


@dataclass(frozen=True)
class Difference:
    """The change of a whole weight or bias, which some files hold beside their LoRA: ``tensor + strength * values``.

    Attributes:
        key: in the file.
        path: the module's path as in the file.
        part: which of the module's tensors changes.
        values: of the tensor's shape.
    """

    key: str
    path: str
    part: Literal["weight", "bias"]
    values: Tensor


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file in memory.

    Attributes:
        modules: the denoiser's layers by :func:`flat_name`.
        text_encoder: the text encoders' layers by prefix and flat name, kept apart.
        unknown: keys that belong to no LoRA layer, those of differences included: a reader of ``modules`` alone loses
            them.
        differences: changes of the denoiser's whole weights and biases.
        text_encoder_differences: the same of the text encoders.
        embeddings: keys of textual-inversion embeddings that were packed into the file.
        dialect: the spelling of the keys.
        alpha_source: the source of alpha.
        metadata: from the header, or known for a published Flash LoRA; else None.
        header: the file's other header strings.
        published: the published file it was recognised as, or None.
        notes: hints for the user, such as layers that were renamed to fit stock models.
    """

    modules: Mapping[str, LoraModule]
    dialect: str
    alpha_source: AlphaSource
    text_encoder: Mapping[str, LoraModule] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    text_encoder_differences: tuple[Difference, ...] = ()
    embeddings: tuple[str, ...] = ()
    metadata: FlashMetadata | None = None
    header: Mapping[str, str] = field(default_factory=dict)
    published: str | None = None
    notes: tuple[str, ...] = ()

    def without_text_encoder(self) -> LoraFile:
        """Return the file without its text encoders' layers and changes."""
        keys = {difference.key for difference in self.text_encoder_differences}
        unknown = tuple(key for key in self.unknown if key not in keys)
        return replace(self, text_encoder={}, text_encoder_differences=(), unknown=unknown)

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
