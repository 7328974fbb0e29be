"""Masks and crops: properties that hold for every picture, and worked values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_diffusion.flash_core.image import (
    Box,
    blend_into,
    context_box,
    crop,
    dilate,
    feather,
    mask_box,
    pad_picture,
    resize,
    shape_within,
    without_drift,
    working_size,
)

SIZES = st.integers(1, 40)


def dot(size: int = 21) -> torch.Tensor:
    """A mask of one white pixel in the middle."""
    mask = torch.zeros(1, size, size)
    mask[0, size // 2, size // 2] = 1
    return mask


def test_dilation_makes_a_square() -> None:
    grown = dilate(dot(), 3)
    assert mask_box(grown) == Box(7, 7, 7, 7)
    assert float(grown.sum()) == 49


def test_dilation_keeps_soft_values() -> None:
    assert float(dilate(dot() * 0.25, 2).max()) == 0.25


@given(st.integers(1, 9))
def test_feather_falls_to_0_at_its_radius(radius: int) -> None:
    mask = dilate(dot(41), 5)
    soft = feather(mask, radius)
    middle = soft[0, 20, 25:]  # from the mask's last pixel outward
    assert float(middle[0]) == 1
    assert bool((middle.diff() <= 1e-6).all())
    assert float(middle[radius]) < 1
    assert float(middle[radius + 1 :].max()) == 0
    assert torch.equal(soft.maximum(mask), soft)


def test_half_the_feather_is_about_half_way() -> None:
    soft = feather(dilate(dot(61), 10), 8)
    assert float(soft[0, 30, 44]) == pytest.approx(0.5, abs=0.11)  # a step of the ramp is .2


@pytest.mark.parametrize("function", [dilate, feather])
def test_negative_radii_raise_an_error(function) -> None:
    with pytest.raises(ValueError, match="-1"):
        function(dot(), -1)


def test_mask_box_of_an_empty_mask_is_none() -> None:
    assert mask_box(torch.zeros(2, 5, 5)) is None


def test_the_box_holds_all_masks_of_a_batch() -> None:
    masks = torch.zeros(2, 10, 12)
    masks[0, 2, 3] = 0.1
    masks[1, 7, 9] = 1
    assert mask_box(masks) == Box(2, 3, 6, 7)


@given(SIZES, SIZES, st.floats(1, 8), st.integers(0, 60), st.data())
def test_a_context_box_holds_its_box_and_lies_in_the_picture(
    height: int, width: int, context: float, least: int, data: st.DataObject
) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    box = Box(top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    wide = context_box(box, height, width, context, least)
    assert 0 <= wide.top <= box.top
    assert box.bottom <= wide.bottom <= height
    assert 0 <= wide.left <= box.left
    assert box.right <= wide.right <= width
    assert wide.height == min(max(math.ceil(box.height * context), least), height)


@given(SIZES, SIZES, st.floats(1, 6), st.data())
def test_a_context_box_has_a_shape_within_the_limit_where_the_picture_has_room(
    height: int, width: int, widest: float, data: st.DataObject
) -> None:
    box = Box(0, 0, data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    wide = context_box(box, height, width, 1.0, widest=widest)
    if wide.height < height and wide.width < width:
        assert max(wide.height, wide.width) - 1 <= widest * min(wide.height, wide.width)
    framed = shape_within(wide.height, wide.width, widest)
    assert framed[0] >= wide.height
    assert framed[1] >= wide.width
    assert max(framed) <= widest * min(framed) * (1 + 1e-9)


def test_shapes_within_a_limit_by_hand() -> None:
    assert shape_within(72, 2048, 2) == (1024, 2048)
    assert shape_within(2048, 72, 4) == (2048, 512)
    assert shape_within(300, 500, 2) == (300, 500)
    assert context_box(Box(492, 4, 48, 2040), 1024, 2048, 1.5, widest=4) == Box(260, 0, 512, 2048)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(128, 16), (512, 64), (1024, 64)]))
def test_a_working_size_has_the_models_area_and_the_boxs_shape(height: int, width: int, model: tuple[int, int]) -> None:
    side, multiple = model
    got_height, got_width = working_size(height, width, side, multiple)
    assert got_height % multiple == got_width % multiple == 0
    if 0.4 < width / height < 2.5:
        assert 0.6 < got_height * got_width / side**2 < 1.6
        assert got_width / got_height == pytest.approx(width / height, rel=0.35)


def test_working_sizes_by_hand() -> None:
    assert working_size(300, 300, 512, 64) == (512, 512)
    assert working_size(100, 400, 1024, 64) == (512, 2048)
    assert working_size(1, 1, 128, 16) == (128, 128)


def test_padding_repeats_the_border() -> None:
    picture = torch.rand(1, 3, 4, 3)
    padded = pad_picture(picture, 2, 1, 0, 5)
    assert padded.shape == (1, 9, 6, 3)
    assert torch.equal(padded[:, 1:4, 2:], picture)
    assert torch.equal(padded[0, 0, 2:], picture[0, 0])
    assert torch.equal(padded[0, 8, 0], picture[0, 2, 0])


@given(st.floats(0, 1), st.integers(3, 4))
def test_blending_leaves_every_bit_outside_the_mask(value: float, channels: int) -> None:
    picture, part = torch.rand(2, 9, 9, channels), torch.rand(2, 4, 5, channels)
    mask = torch.zeros(1, 4, 5)
    mask[0, 1:3, 2] = value
    box = Box(3, 2, 4, 5)
    result = blend_into(picture, part, mask, box)
    outside = torch.ones(9, 9, dtype=torch.bool)
    outside[4:6, 4] = False
    assert torch.equal(result[:, outside], picture[:, outside])
    inside = picture[:, 4:6, 4] * (1 - value) + part[:, 1:3, 2] * value
    assert torch.allclose(result[:, 4:6, 4], inside, atol=1e-6)


def test_resizing_to_the_same_size_is_the_picture_itself() -> None:
    picture = torch.rand(1, 5, 6, 3)
    assert resize(picture, 5, 6) is picture
    assert resize(picture[..., 0], 10, 3).shape == (1, 10, 3)
    assert resize(picture, 10, 3).shape == (1, 10, 3, 3)


def test_a_crop_is_a_part() -> None:
    picture = torch.arange(24.0).reshape(1, 4, 6, 1)
    assert crop(picture, Box(1, 2, 2, 3))[0, :, :, 0].tolist() == [[8, 9, 10], [14, 15, 16]]


def test_drift_of_colours_is_taken_off_by_what_the_kept_pixels_show() -> None:
    picture = torch.rand(2, 12, 10, 3, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    drift = torch.tensor([0.05, -0.04, 0.1])
    drawn = picture + drift
    drawn[:, 4:8, 3:7] = 0.5  # new content, whose colours say nothing of the drift
    kept = torch.ones(1, 12, 10)
    kept[:, 4:8, 3:7] = 0
    mended = without_drift(drawn, picture, kept)
    assert torch.allclose(mended[:, :4], picture[:, :4], atol=1e-6)
    assert torch.allclose(mended[:, 4:8, 3:7], (0.5 - drift).expand(2, 4, 4, 3), atol=1e-6)
    assert torch.equal(without_drift(drawn, picture, torch.zeros(1, 12, 10)), drawn)
