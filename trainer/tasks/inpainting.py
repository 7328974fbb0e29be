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
from .figures import PERCEPTUAL, Figure, Scene
from .masks import MaskKind, random_masks
from .scores import distance, psnr, seam

if TYPE_CHECKING:
    from ..teachers.base import Teacher


def _all_kinds() -> dict[MaskKind, float]:
    return {"strokes": 1.0, "box": 1.0, "outpainting": 1.0, "blob": 1.0}


class InpaintingOptions(Section):
    """The kinds of random masks."""

    masks: dict[MaskKind, float] = Field(
        default_factory=_all_kinds,
        min_length=1,
        description="relative frequency of each kind of mask",
    )


class Inpainting(Task):
    """Paint the masked part so that it fits the rest of the picture and the prompt.

    The channels are those of Stable Diffusion's inpainting models, in their order: the mask at the latent's size, 1
    where the model paints, then the latents of the picture with mid-grey under the mask. Guidance strengthens
    the prompt alone: both branches see mask and picture.
    """

    name = "inpainting"
    options_class: ClassVar[type[Section]] = InpaintingOptions
    options: InpaintingOptions
    companions = ("mask",)
    figures = (
        Figure(
            "features",
            "Feature distance of the masked region",
            "features",
            "Distance between the result and the original in feature space; they differ only under the mask. Many "
            "fillings are right, so compare with the teacher’s distance, not with 0.",
            higher_is_better=False,
        ),
        PERCEPTUAL,
        Figure(
            "seam",
            "Seam visibility",
            "seam",
            "Colour step across the mask’s border in the result, relative to the original near the border. 1 = no "
            "seam.",
            higher_is_better=False,
        ),
        Figure(
            "outside",
            "PSNR outside the mask",
            "outside",
            "Between the model’s picture and the original outside the mask, before the masked part is pasted into the "
            "original (after that, these pixels are the original’s). It shows how well the model reads the "
            "surroundings.",
            higher_is_better=True,
            unit="dB",
        ),
    )

    def extra_channels(self, latent_channels: int) -> int:
        """Return the number of channels of the mask and the masked picture's latents: 5 for latents of 4."""
        return 1 + latent_channels

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``mask`` (the companion, else random) and ``masked``, the picture with grey under the mask."""
        masks = companions.get("mask")
        if masks is None:
            height, width = images.shape[-2:]
            masks = random_masks(len(images), (height, width), self.options.masks, generator).to(images)
        masks = black_and_white(masks)
        return {"mask": masks, "masked": masked_pictures(images, masks)}

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """Return the extra channels."""
        return Conditioning(concat=inpainting_channels(drawn["masked"], drawn["mask"], teacher))

    def finished(self, made: Tensor, scene: Scene) -> Tensor:
        """Return the result with the original's pixels outside the mask."""
        return put_back(made, scene)

    def scores(self, made: Tensor, scene: Scene) -> dict[str, Tensor]:
        """Return the measures of the pasted result, and of the model's picture outside the mask."""
        result, mask = put_back(made, scene), scene.drawn["mask"]
        found = {
            "features": distance(scene.look(result), scene.look(scene.originals)),
            "seam": seam(result, scene.originals, mask),
            "outside": psnr(made, scene.originals, mask < 0.5),
        }
        if scene.perceptual is not None:
            found["lpips"] = scene.perceptual(result, scene.originals)
        return found

    def shown(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masked picture."""
        return {"masked": drawn["masked"] / 2 + 0.5}


def black_and_white(masks: Tensor) -> Tensor:
    """Return masks of 0 and 1 from masks in 0..1, as diffusers' pipelines do: 0.5 counts as masked."""
    return (masks >= 0.5).to(masks)


def masked_pictures(images: Tensor, masks: Tensor) -> Tensor:
    """Return pictures (B, 3, H, W) in [-1, 1] with mid-grey where masks (B, 1, H, W) are above 0.5."""
    return images * (masks < 0.5)


def inpainting_channels(masked: Tensor, masks: Tensor, teacher: Teacher) -> Tensor:
    """Return the extra channels (B, 1 + C, h, w) of an inpainting model.

    Args:
        masked: (B, 3, H, W) in [-1, 1], see :func:`masked_pictures`.
        masks: (B, 1, H, W), 1 where the model paints.
    """
    latents = teacher.encode(masked)
    small = F.interpolate(masks, latents.shape[-2:], mode="nearest")
    return torch.cat([small, latents], dim=1)


def put_back(made: Tensor, scene: Scene) -> Tensor:
    """Return made pictures under the mask and the originals elsewhere, in [0, 1]."""
    return torch.where(scene.drawn["mask"] >= 0.5, made, scene.originals)
