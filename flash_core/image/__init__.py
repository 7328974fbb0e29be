"""Pictures and masks: the shared code of inpainting, outpainting and super-resolution."""

from __future__ import annotations

from .crops import (
    Box,
    blend_into,
    context_box,
    crop,
    pad_picture,
    resize,
    same_shape,
    shape_within,
    without_drift,
    working_size,
)
from .masks import dilate, feather, mask_box
from .tiles import Tiling, plan_tiles

__all__ = [
    "Box",
    "Tiling",
    "blend_into",
    "context_box",
    "crop",
    "dilate",
    "feather",
    "mask_box",
    "pad_picture",
    "plan_tiles",
    "resize",
    "same_shape",
    "shape_within",
    "without_drift",
    "working_size",
]
