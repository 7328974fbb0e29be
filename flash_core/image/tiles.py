"""Overlapping tiles: where they lie, and the weights that put what is made of them together without a seam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .crops import Box


@dataclass(frozen=True)
class Tiling:
    """Tiles of one size that cover a picture, row by row; neighbours overlap.

    The unit is pixels, or positions of a latent. Parts and wholes are (..., H, W).

    Attributes:
        height, width: size of the whole.
        tile_height, tile_width: size of each tile.
        tops, lefts: the first row and the first column of the tiles, ascending.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Return every tile's box."""
        return tuple(Box(top, left, self.tile_height, self.tile_width) for top in self.tops for left in self.lefts)

    def scaled(self, factor: int) -> Tiling:
        """Return the same tiles on a grid that is ``factor`` times finer: a latent's tiles in pixels."""
        return Tiling(
            self.height * factor,
            self.width * factor,
            self.tile_height * factor,
            self.tile_width * factor,
            tuple(top * factor for top in self.tops),
            tuple(left * factor for left in self.lefts),
        )

    def take(self, whole: Tensor, index: int) -> Tensor:
        """Return a tile of ``whole`` as a view. The tile is smaller where ``whole`` ends before the tile does."""
        box = self.boxes[index]
        return whole[..., box.top : box.bottom, box.left : box.right]

    def add(self, whole: Tensor, part: Tensor, index: int) -> None:
        """Add a tile, times its weights, to ``whole`` in place.

        When every tile has been added to zeros, each position holds the weighted mean of its tiles. Values beyond the
        end of ``whole`` are dropped.

        Args:
            part: (..., tile_height, tile_width).
        """
        region = self.take(whole, index)
        height, width = region.shape[-2:]
        region += (part.to(region) * self.weight(index).to(region))[..., :height, :width]

    def weight(self, index: int) -> Tensor:
        """Return a tile's weights, (tile_height, tile_width) float32; all tiles' weights sum to 1 at each position."""
        row, column = divmod(index, len(self.lefts))
        return self._row_weights[row][:, None] * self._column_weights[column]

    @cached_property
    def _row_weights(self) -> Tensor:
        return blend_weights(self.height, self.tile_height, self.tops)

    @cached_property
    def _column_weights(self) -> Tensor:
        return blend_weights(self.width, self.tile_width, self.lefts)


def plan_tiles(height: int, width: int, tile: int, overlap: int) -> Tiling:
    """Plan tiles of ``tile`` x ``tile``, or as large as the whole if the whole is smaller.

    Args:
        overlap: the least overlap of neighbours; tiles are evenly spaced, so most overlaps are a little larger.

    Raises:
        ValueError: a size is not positive, or the overlap is not smaller than the tile.
    """
    if min(height, width, tile) < 1:
        raise ValueError(f"tiles need sizes of at least 1, got tiles of {tile} on {height} x {width}")
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles overlap by 0 or more and by less than their size {tile}, got {overlap}")
    return Tiling(
        height,
        width,
        min(tile, height),
        min(tile, width),
        tile_starts(height, tile, overlap),
        tile_starts(width, tile, overlap),
    )


def tile_starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Return the starts of the fewest tiles that cover ``length`` with that overlap, evenly spaced, on one axis."""
    if tile >= length:
        return (0,)
    last = math.ceil((length - tile) / (tile - overlap))
    return tuple(round(index * (length - tile) / last) for index in range(last + 1))


def blend_weights(length: int, tile: int, starts: Sequence[int]) -> Tensor:
    """Return the tiles' weights on one axis, (tiles, tile) float32: raised cosines over each overlap, summing to 1.

    A single tile has weights of exactly 1.
    """
    place = torch.arange(tile, dtype=torch.float64) + 0.5
    windows = []
    for index, start in enumerate(starts):
        window = torch.ones(tile, dtype=torch.float64)
        if index > 0:
            window = window * _ramp(place, starts[index - 1] + tile - start)
        if index + 1 < len(starts):
            window = window * _ramp(tile - place, start + tile - starts[index + 1])
        windows.append(window)
    total = torch.zeros(length, dtype=torch.float64)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile] += window
    normalised = [window / total[start : start + tile] for start, window in zip(starts, windows, strict=True)]
    return torch.stack(normalised).float()


def _ramp(distance: Tensor, overlap: int) -> Tensor:
    """Return weights that rise from 0 at the tile's edge to 1 at ``overlap`` positions from the edge."""
    return torch.sin(math.pi / 2 * (distance / overlap).clamp(max=1)) ** 2 if overlap > 0 else torch.ones_like(distance)
