"""What a LoRA file holds, independent of the dialect it was written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from .metadata import FlashMetadata

AlphaSource: TypeAlias = Literal["file", "header", "adapter_config", "unknown"]


def flat_name(path: str) -> str:
    """A module path with underscores for dots: the one spelling that every dialect can be brought to.

    Some dialects only keep this form (``lora_unet_down_blocks_0_...``), from which the dots can't be recovered without
    the model, while no two modules of a diffusion model share it.
    """
    return path.replace(".", "_")


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


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, read.

    Attributes:
        modules: the denoiser's layers by :func:`flat_name`.
        text_encoder: the text encoders' layers by prefix and flat name, kept apart.
        unknown: keys that belong to no layer we can name.
        dialect: how the keys were spelt.
        alpha_source: where alpha came from.
        metadata: what a Flash LoRA says of itself, or None.
        header: the file's other header strings.
    """

    modules: Mapping[str, LoraModule]
    dialect: str
    alpha_source: AlphaSource
    text_encoder: Mapping[str, LoraModule] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    metadata: FlashMetadata | None = None
    header: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({module.rank for module in self.modules.values()}))

    @property
    def alphas(self) -> tuple[float, ...]:
        """The distinct known alphas, ascending."""
        return tuple(sorted({module.alpha for module in self.modules.values() if module.alpha is not None}))
