"""Tiles: they cover the whole, overlap enough, and blend to the same picture."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_diffusion.flash_core.image import Box, crop, plan_tiles
from flash_diffusion.flash_core.image.tiles import blend_weights, tile_starts

LENGTHS = st.integers(1, 200)


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int]:
    """A length, a tile's size and an overlap."""
    tile = draw(st.integers(1, 40))
    return draw(LENGTHS), tile, draw(st.integers(0, tile - 1))


@given(axes())
def test_tiles_cover_the_whole_and_overlap_enough(axis: tuple[int, int, int]) -> None:
    length, tile, overlap = axis
    starts = tile_starts(*axis)
    if tile >= length:
        assert starts == (0,)
        return
    assert (starts[0], starts[-1]) == (0, length - tile)
    steps = [after - before for before, after in pairwise(starts)]
    assert all(1 <= step <= tile - overlap for step in steps)
    assert max(steps) - min(steps) <= 1
    # One tile fewer could not do it.
    assert (len(starts) - 2) * (tile - overlap) + tile < length


@given(axes(), axes())
def test_cutting_into_tiles_and_blending_is_the_identity(
    rows: tuple[int, int, int], columns: tuple[int, int, int]
) -> None:
    tiles = plan_tiles(rows[0], columns[0], rows[1], rows[2])
    whole = torch.rand(2, 3, rows[0], columns[0])
    again = torch.zeros_like(whole)
    for index in range(len(tiles)):
        tiles.add(again, tiles.take(whole, index), index)
    assert torch.allclose(again, whole, atol=1e-6)


def test_starts_by_hand() -> None:
    assert tile_starts(64, 16, 4) == (0, 12, 24, 36, 48)
    assert tile_starts(100, 64, 16) == (0, 36)
    assert tile_starts(10, 4, 0) == (0, 3, 6)


def test_weights_by_hand() -> None:
    """Two tiles of 4 that share 2 positions: sin^2(pi/8) and sin^2(3 pi/8) there, 1 elsewhere."""
    low, high = math.sin(math.pi / 8) ** 2, math.sin(3 * math.pi / 8) ** 2
    expected = torch.tensor([[1, 1, high, low], [low, high, 1, 1]])
    assert torch.allclose(blend_weights(6, 4, (0, 2)), expected)


def test_weights_rise_and_fall_once() -> None:
    """Of a tile with neighbours on both sides, in three rows that overlap by more than half of a tile."""
    weights = blend_weights(24, 12, (0, 6, 12))[1]
    assert bool((weights[:6].diff() > 0).all())
    assert torch.allclose(weights, weights.flip(0), atol=1e-6)
    assert float(weights[0]) < 0.02


def test_a_single_tile_has_weight_1() -> None:
    tiles = plan_tiles(5, 7, 16, 4)
    part = torch.randn(1, 4, 5, 7)
    whole = torch.zeros_like(part)
    tiles.add(whole, part, 0)
    assert len(tiles) == 1
    assert torch.equal(whole, part)


def test_tiles_go_row_by_row() -> None:
    assert plan_tiles(4, 6, 4, 2).boxes == (Box(0, 0, 4, 4), Box(0, 2, 4, 4))
    picture = torch.arange(24.0).reshape(1, 4, 6, 1)
    tiles = plan_tiles(4, 6, 2, 0)
    for index, box in enumerate(tiles.boxes):
        assert torch.equal(tiles.take(picture[..., 0], index), crop(picture, box)[..., 0])


def test_a_finer_grid_has_the_same_tiles() -> None:
    fine = plan_tiles(10, 13, 6, 2).scaled(8)
    assert (fine.height, fine.width, fine.tile_height, fine.tile_width) == (80, 104, 48, 48)
    assert fine.boxes[-1] == Box(32, 56, 48, 48)


def test_values_beyond_the_end_are_dropped() -> None:
    """An example: pixels that only fill the last latent position."""
    tiles = plan_tiles(2, 3, 2, 1).scaled(8)
    whole = torch.zeros(1, 1, 13, 20)
    for index in range(len(tiles)):
        tiles.add(whole, torch.ones(1, 1, 16, 16), index)
    assert torch.allclose(whole, torch.ones_like(whole))


@pytest.mark.parametrize(
    ("sizes", "words"), [((4, 4, 4, 4), "got 4"), ((4, 4, 4, -1), "got -1"), ((0, 4, 4, 0), "0 x 4")]
)
def test_impossible_tiles_raise_an_error(sizes: tuple[int, int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_tiles(*sizes)
