"""Cropping a part of a picture to work on, and putting the result back. Pictures are (B, H, W, C) in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# How far two sizes' ratios of width to height may differ and still be one picture's, rounded to pixels.
SHAPE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row below the box."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The first column to the right of the box."""
        return self.left + self.width


def context_box(box: Box, height: int, width: int, context: float, least: int = 0, widest: float = math.inf) -> Box:
    """Widen a box so that a model sees its surroundings, within a picture of ``height`` x ``width``.

    Args:
        context: how many times the box's size the result should have; 1 adds nothing.
        least: the result's least side in pixels, where the picture has them. Default: 0.
        widest: see :func:`shape_within`; the result has such a shape where the picture is large enough. Default:
            no limit.
    """
    if context < 1:
        raise ValueError(f"context is a multiple of the masked part's size, at least 1, got {context}")
    wanted_height = min(max(math.ceil(box.height * context), least), height)
    wanted_width = min(max(math.ceil(box.width * context), least), width)
    shape = shape_within(wanted_height, wanted_width, widest)
    wanted_height, wanted_width = min(shape[0], height), min(shape[1], width)
    top = _centred(box.top, box.height, wanted_height, height)
    left = _centred(box.left, box.width, wanted_width, width)
    return Box(top, left, wanted_height, wanted_width)


def shape_within(height: int, width: int, widest: float) -> tuple[int, int]:
    """Return the smallest (height, width) that holds this size and whose longer side is at most ``widest`` x the other.

    Args:
        widest: 1 makes a square; infinity changes nothing.
    """
    return max(height, math.ceil(width / widest)), max(width, math.ceil(height / widest))


def working_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Return the (height, width) at which a model works on a part of this shape: about ``side`` x ``side`` pixels.

    Args:
        multiple: both are multiples of this, at least one time.
    """
    scale = side / math.sqrt(height * width)
    return (
        max(multiple, round(height * scale / multiple) * multiple),
        max(multiple, round(width * scale / multiple) * multiple),
    )


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes (height, width) have the same ratio."""
    return abs((size[1] / size[0]) / (other[1] / other[0]) - 1) <= SHAPE_TOLERANCE


def crop(picture: Tensor, box: Box) -> Tensor:
    """Return the box's part of pictures (B, H, W, C) or masks (B, H, W), as a view."""
    return picture[:, box.top : box.bottom, box.left : box.right]


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """Resize with antialiasing: bicubic for pictures (B, H, W, C), bilinear for masks (B, H, W)."""
    if tuple(picture.shape[1:3]) == (height, width):
        return picture
    if picture.ndim == 3:
        return F.interpolate(picture[:, None], (height, width), mode="bilinear", antialias=True)[:, 0]
    moved = F.interpolate(picture.movedim(-1, 1), (height, width), mode="bicubic", antialias=True)
    return moved.movedim(1, -1).clamp(0, 1)


def pad_picture(picture: Tensor, left: int, top: int, right: int, bottom: int) -> Tensor:
    """Pad pictures (B, H, W, C) by repeating the outermost pixels."""
    if min(left, top, right, bottom) < 0:
        raise ValueError(f"padding is 0 or more on each side, got {left}, {top}, {right}, {bottom}")
    return F.pad(picture.movedim(-1, 1), (left, right, top, bottom), mode="replicate").movedim(1, -1)


def blend_into(picture: Tensor, part: Tensor, mask: Tensor, box: Box) -> Tensor:
    """Put ``part`` into the box of a picture, mixed by ``mask``; where the mask is 0 every bit stays.

    Args:
        picture: (B, H, W, C).
        part: (B, h, w, C), of the box's size.
        mask: (B or 1, h, w).
    """
    result = picture.clone()
    before = crop(picture, box)
    weight = mask[..., None]
    mixed = torch.lerp(before, part.to(before), weight.to(before))
    crop(result, box).copy_(torch.where(weight > 0, mixed, before))
    return result


def without_drift(part: Tensor, picture: Tensor, kept: Tensor) -> Tensor:
    """Shift the colours of a part that a model has drawn, so that its kept pixels have the picture's mean colours.

    A VAE and a few sampling steps change colours a little everywhere, also where nothing was to change. There the
    change is known, and the same shift is taken off the whole part.

    Args:
        part: (B, h, w, C).
        picture: (B, h, w, C), the same place in the picture.
        kept: (B or 1, h, w), above 0 where the picture stays. Where nothing is kept the part is returned as it is.
    """
    weight = kept[..., None].expand(*part.shape[:3], 1)
    total = weight.sum((1, 2), keepdim=True)
    drift = ((part - picture) * weight).sum((1, 2), keepdim=True) / total.clamp(min=1e-6)
    return torch.where(total > 0, (part - drift).clamp(0, 1), part)


def _centred(start: int, length: int, wanted: int, limit: int) -> int:
    """Return the start of a window of ``wanted`` centred on ``start .. start + length`` and inside ``0 .. limit``."""
    return min(max(start - (wanted - length) // 2, 0), limit - wanted)
