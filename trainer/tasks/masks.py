"""Random masks as people paint them: strokes, boxes, borders to fill, and blobs with the outline of things.

Masks are (B, 1, H, W), 1 where the model paints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

MaskKind: TypeAlias = Literal["strokes", "box", "outpainting", "blob"]

# Shares of the picture's area or side; wide enough that small repairs and whole redraws are both learnt.
STROKES = (1, 6)
STROKE_POINTS = (2, 8)
STROKE_WIDTH = (0.05, 0.25)
BOX_SIDE = (0.2, 0.8)
BORDER = (0.15, 0.5)
BLOB_AREA = (0.1, 0.6)
BLOB_CELLS = (3, 6)  # of the coarse noise that a blob is cut from
WHOLE = 0.05  # how often everything is masked, so that the model still makes pictures from text alone


def random_masks(
    batch: int, size: tuple[int, int], weights: Mapping[MaskKind, float], generator: torch.Generator
) -> Tensor:
    """Draw masks (B, 1, H, W).

    Args:
        size: (H, W).
        weights: relative frequency of each kind.

    Raises:
        ValueError: no kind has a positive weight.
    """
    kinds = list(weights)
    share = torch.tensor([float(weights[kind]) for kind in kinds], dtype=torch.float64)
    if len(kinds) == 0 or bool((share < 0).any()) or not float(share.sum()) > 0:
        raise ValueError(
            f"masks need at least one kind with a weight above 0 and no negative weight, got {dict(weights)}"
        )
    masks = []
    for _ in range(batch):
        if _uniform(generator) < WHOLE:
            masks.append(torch.ones(size))
            continue
        kind = kinds[int(torch.multinomial(share, 1, generator=generator))]
        masks.append(_DRAW[kind](size, generator))
    return torch.stack(masks)[:, None]


def _strokes(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw brush strokes: thick lines with round joints."""
    height, width = size
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    for _ in range(_integer(STROKES, generator)):
        thickness = max(1, round(_between(STROKE_WIDTH, generator) * min(size)))
        points = [
            (_uniform(generator) * width, _uniform(generator) * height)
            for _ in range(_integer(STROKE_POINTS, generator))
        ]
        draw.line(points, fill=255, width=thickness, joint="curve")
        for x, y in points:
            draw.ellipse((x - thickness / 2, y - thickness / 2, x + thickness / 2, y + thickness / 2), fill=255)
    return torch.from_numpy(np.array(canvas)).float() / 255


def _box(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw one rectangle."""
    height, width = (max(1, round(_between(BOX_SIDE, generator) * side)) for side in size)
    top = int(_uniform(generator) * (size[0] - height + 1))
    left = int(_uniform(generator) * (size[1] - width + 1))
    mask = torch.zeros(size)
    mask[top : top + height, left : left + width] = 1
    return mask


def _outpainting(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a border on one to four sides."""
    mask = torch.zeros(size)
    sides = [side for side in range(4) if _uniform(generator) < 0.5] or [_integer((0, 3), generator)]
    for side in sides:
        depth = max(1, round(_between(BORDER, generator) * size[side // 2]))
        if side == 0:
            mask[:depth] = 1
        elif side == 1:
            mask[-depth:] = 1
        elif side == 2:
            mask[:, :depth] = 1
        else:
            mask[:, -depth:] = 1
    return mask


def _blob(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw a blob: smooth noise above the threshold that gives the wanted area, with outlines like a segmentation's."""
    cells = _integer(BLOB_CELLS, generator)
    noise = torch.randn(1, 1, cells, cells, generator=generator)
    smooth = F.interpolate(noise, size, mode="bicubic")[0, 0]
    level = smooth.flatten().quantile(1 - _between(BLOB_AREA, generator))
    return (smooth > level).float()


_DRAW: dict[MaskKind, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "strokes": _strokes,
    "box": _box,
    "outpainting": _outpainting,
    "blob": _blob,
}


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _between(limits: tuple[float, float], generator: torch.Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * _uniform(generator)


def _integer(limits: tuple[int, int], generator: torch.Generator) -> int:
    return int(torch.randint(limits[0], limits[1] + 1, (), generator=generator))
