"""Inpainting with models that read a mask and the masked picture as further channels (SD's 9-channel UNets)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ..config import Section
from .base import Task
from .masks import MaskKind, random_masks

if TYPE_CHECKING:
    from ..teachers.base import Teacher


class InpaintingOptions(Section):
    """Which masks are drawn."""

    masks: dict[MaskKind, float] = Field(
        default_factory=lambda: {"strokes": 1.0, "box": 1.0, "outpainting": 1.0, "blob": 1.0},
        min_length=1,
        description="how often each kind of mask is drawn, relative to the others",
    )


class Inpainting(Task):
    """The masked part is made anew to fit the rest and the prompt.

    The channels are those of Stable Diffusion's inpainting models, in their order: the mask at the latent's size, 1
    where something is to be made, then the latents of the picture with mid-grey under the mask. Guidance strengthens
    the prompt alone: both branches see mask and picture.
    """

    name = "inpainting"
    options_class: ClassVar[type[Section]] = InpaintingOptions
    options: InpaintingOptions
    companions = ("mask",)

    def extra_channels(self, latent_channels: int) -> int:
        """The mask and the masked picture's latents: 5 for latents of 4."""
        return 1 + latent_channels

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """``mask``, random where none lies beside the picture, and ``masked``, what it leaves."""
        masks = companions.get("mask")
        if masks is None:
            height, width = images.shape[-2:]
            masks = random_masks(len(images), (height, width), self.options.masks, generator).to(images)
        return {"mask": masks, "masked": masked_pictures(images, masks)}

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """The further channels."""
        return Conditioning(concat=inpainting_channels(drawn["masked"], drawn["mask"], teacher))


def masked_pictures(images: Tensor, masks: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] with mid-grey where masks (B, 1, H, W) are above a half."""
    return images * (masks < 0.5)


def inpainting_channels(masked: Tensor, masks: Tensor, teacher: Teacher) -> Tensor:
    """The channels (B, 1 + C, h, w) of an inpainting model.

    Args:
        masked: (B, 3, H, W) in [-1, 1], see :func:`masked_pictures`.
        masks: (B, 1, H, W), 1 where something is to be made.
    """
    latents = teacher.encode(masked)
    small = F.interpolate(masks, latents.shape[-2:], mode="nearest")
    return torch.cat([small, latents], dim=1)
