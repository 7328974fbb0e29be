"""Sharpness and contrast of pictures. A blurred student lies far below its teacher, an over-sharpened one above."""

from __future__ import annotations

from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def luminance(images: Tensor) -> Tensor:
    """Return the luminance (B, H, W) of pictures (B, 3, H, W) in [0, 1]."""
    weights = images.new_tensor(LUMINANCE)[:, None, None]
    return (images * weights).sum(1)


def sharpness(images: Tensor) -> Tensor:
    """Return the gradient energy (B,): the mean squared difference of neighbouring pixels' luminance, both ways."""
    grey = luminance(images.float())
    across, down = grey.diff(dim=2).square().mean((1, 2)), grey.diff(dim=1).square().mean((1, 2))
    return across + down


def contrast(images: Tensor) -> Tensor:
    """Return the standard deviation (B,) of the luminance inside each picture."""
    return luminance(images.float()).flatten(1).std(1)
