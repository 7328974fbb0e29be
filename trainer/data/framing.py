"""Scale pictures and masks until they cover a frame, and cut them at the centre."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from ..pictures import picture_signed


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return a picture as (3, H, W) in [-1, 1]: scaled until it covers ``size`` = (H, W), then cut at the centre."""
    return picture_signed(framed(image, size))


def to_mask(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return a mask as (1, H, W) in [0, 1], 1 for white, scaled and cut as :func:`to_tensor` does."""
    return to_tensor(image.convert("L").convert("RGB"), size)[:1] / 2 + 0.5


def framed(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return a picture scaled until it covers ``size`` = (H, W), then cut at the centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        # At least as large as the target in both directions, whatever the rounding.
        fitted = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(fitted, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
