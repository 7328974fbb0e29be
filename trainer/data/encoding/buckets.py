"""Aspect-ratio buckets: frames of about the same area, so that pictures keep their shape and a batch has one size.

At 1024 px the frames are SDXL's own (arXiv 2307.01952, appendix I): multiples of 64 px, 90 to 100 % of the square's
area, sides of at most 4 : 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS = 16  # sides are multiples of resolution / STEPS, where the model allows
SMALLEST_AREA = 0.9  # of the square's
LARGEST_ASPECT = 4
PICTURES_AT_ONCE = 1 << 16


def bucket_sizes(resolution: int, grain: int, longest: int | None = None) -> list[tuple[int, int]]:
    """Return the frames (height, width) of a resolution, the square among them, from the widest to the tallest.

    Args:
        resolution: side of the square in pixels.
        grain: the model takes heights and widths that are multiples of this, in pixels.
        longest: side that the model takes at most, in pixels; None without a limit.
    """
    step = max(grain, resolution // STEPS // grain * grain)
    sides = range(step, min(LARGEST_ASPECT * resolution, longest or LARGEST_ASPECT * resolution) + 1, step)
    area = resolution * resolution
    sizes = {
        (height, width)
        for height in sides
        for width in sides
        if SMALLEST_AREA * area <= height * width <= area and max(height, width) <= LARGEST_ASPECT * min(height, width)
    }
    return sorted(sizes | {(resolution, resolution)}, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(sizes: NDArray[np.int32], frames: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Return for each picture the frame whose aspect ratio is nearest, the larger one of two equally near, (n,).

    Args:
        sizes: (n, 2) width and height of pictures in pixels.
        frames: (height, width) each.
    """
    frame = np.log([width / height for height, width in frames])
    area = np.array([height * width for height, width in frames])
    nearest = [np.empty(0, np.int64)]
    for first in range(0, len(sizes), PICTURES_AT_ONCE):
        width, height = np.maximum(sizes[first : first + PICTURES_AT_ONCE], 1).T
        distance = np.abs(np.log(width / height)[:, None] - frame[None]).round(9)
        nearest.append(np.where(distance == distance.min(1, keepdims=True), area[None], 0).argmax(1))
    return np.concatenate(nearest)
