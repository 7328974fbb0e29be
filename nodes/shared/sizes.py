"""The sizes of latents that a MODEL can be evaluated at: multiples, a least size, a largest size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_base
from comfy.model_patcher import ModelPatcher

from .model_facts import family_name, native_side

PIXELS = 8  # for each latent position, in the families with limits
# ComfyUI's PixArt divides by round(mean of the latent's sides / 64), which is 0 below this sum of both sides.
PIXART_LEAST_SUM = 66


@dataclass(frozen=True)
class LatentSizes:
    """The (height, width) of the latents that a model can be evaluated at.

    Attributes:
        multiple: each side is a multiple of this number. Default: 1.
        least_sum: height + width is at least this number. Default: 2.
        most: each side is at most this number; None without a limit. Default: None.
    """

    multiple: int = 1
    least_sum: int = 2
    most: int | None = None

    def fits(self, height: int, width: int) -> bool:
        """Return whether the model can be evaluated at this size."""
        return (
            height % self.multiple == width % self.multiple == 0
            and height + width >= self.least_sum
            and (self.most is None or max(height, width) <= self.most)
        )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Return the smallest (height, width) that holds this size and is a multiple and large enough."""
        height, width = self._up(height), self._up(width)
        lacking = self._up(max(self.least_sum - height - width, 0))
        share = lacking // 2 // self.multiple * self.multiple
        return height + share, width + lacking - share

    def tile(self, side: int, height: int, width: int) -> int:
        """Return the tile's side that comes closest to ``side`` in a latent of (height, width), which is padded."""
        least = max(self._up(-(-self.least_sum // 2)), self._up(self.least_sum - min(height, width)))
        side = max(self._up(side), least)
        return side if self.most is None else min(side, self.most)

    def words(self) -> str:
        """Describe the limits in pixels: "sides that are multiples of 16 pixels"."""
        parts = []
        if self.multiple > 1:
            parts.append(f"sides that are multiples of {self.multiple * PIXELS} pixels")
        if self.least_sum > 2:
            parts.append(f"height + width of {self.least_sum * PIXELS} pixels or more")
        if self.most is not None:
            parts.append(f"sides of {self.most * PIXELS} pixels or less")
        return " and ".join(parts)

    def _up(self, side: int) -> int:
        return -(-side // self.multiple) * self.multiple


def latent_sizes(model: ModelPatcher) -> LatentSizes:
    """Return the sizes of latents that the model can be evaluated at; most models take every size."""
    network: Any = model.model.diffusion_model
    if isinstance(model.model, comfy.model_base.PixArt):
        return LatentSizes(multiple=2, least_sum=PIXART_LEAST_SUM)
    if isinstance(model.model, comfy.model_base.SD3) and getattr(network, "pos_embed", None) is not None:
        return LatentSizes(most=int(network.pos_embed_max_size) * int(network.patch_size))
    return LatentSizes()


def check_size(model: ModelPatcher, height: int, width: int) -> None:
    """Raise ValueError where the model cannot be evaluated at a latent of (height, width)."""
    sizes = latent_sizes(model)
    if not sizes.fits(height, width):
        raise ValueError(
            f"This latent is for a picture of {PIXELS * width} x {PIXELS * height} pixels. {family_name(model)} in "
            f"ComfyUI needs {sizes.words()}. Choose such a size, best one near the model's own. Flash Upscale enlarges "
            "pictures to any size."
        )


def latent_shape(model: ModelPatcher, width: int, height: int) -> tuple[int, ...]:
    """Return (C, h, w) of the latents of a picture; 0 is the model's own side.

    Raises:
        ValueError: ComfyUI cannot evaluate the model at this size.
    """
    side = native_side(model)
    latent_format = model.get_model_object("latent_format")
    pixels = getattr(latent_format, "spacial_downscale_ratio", PIXELS)
    height, width = ((given or side) // pixels for given in (height, width))
    if min(height, width) == 0:
        raise ValueError(f"A side is below {pixels} pixels. Choose larger sides, or 0 for the model's own.")
    check_size(model, height, width)
    return (int(latent_format.latent_channels), height, width)
