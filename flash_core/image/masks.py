"""Masks: where a picture may change. (B, H, W) float, 0 keeps a pixel and 1 makes it anew; between is a mixture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .crops import Box


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Grow a mask by ``radius`` pixels in every direction: each pixel takes the largest value within that square.

    Soft values stay soft. ``radius`` 0 returns the mask itself.
    """
    if radius < 0:
        raise ValueError(f"a mask grows by 0 pixels or more, got {radius}")
    if radius == 0:
        return mask
    window = 2 * radius + 1
    # One direction after the other: a square window of a thousand pixels stays cheap.
    rows = F.max_pool2d(mask[:, None], (window, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(rows, (1, window), stride=1, padding=(0, radius))[:, 0]


def feather(mask: Tensor, radius: int) -> Tensor:
    """Soften a mask's edge OUTWARD over ``radius`` pixels; masked pixels keep their value.

    The ramp falls from the mask's value at its edge to 0 at ``radius`` pixels from it. ``radius`` 0 returns the mask.
    """
    if radius < 0:
        raise ValueError(f"a mask is feathered over 0 pixels or more, got {radius}")
    if radius == 0:
        return mask
    inner = radius // 2
    outer = radius - inner
    # A dilated edge, blurred over as much as it was dilated, ends where the ramp should.
    grown = dilate(mask, inner)[:, None]
    kernel = _bell(outer, mask)
    padded = F.pad(grown, (outer, outer, outer, outer), mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel.reshape(1, 1, -1, 1)), kernel.reshape(1, 1, 1, -1))[:, 0]
    return torch.maximum(mask, blurred.clamp(0, 1))


def mask_box(mask: Tensor, threshold: float = 0.0) -> Box | None:
    """Return the smallest box around the pixels above ``threshold`` of all masks, or None without such pixels."""
    hit = (mask > threshold).any(0)
    rows, columns = hit.any(1).nonzero()[:, 0], hit.any(0).nonzero()[:, 0]
    if len(rows) == 0:
        return None
    top, left = int(rows[0]), int(columns[0])
    return Box(top, left, int(rows[-1]) + 1 - top, int(columns[-1]) + 1 - left)


def _bell(radius: int, like: Tensor) -> Tensor:
    """Return a Hann window of ``2 radius + 1`` weights that sum to 1."""
    window = torch.hann_window(2 * radius + 3, periodic=False, dtype=like.dtype, device=like.device)[1:-1]
    return window / window.sum()
