"""Pictures between tensors and Pillow, on white, in grids and in pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from flash_diffusion.trainer.pictures import (
    GAP,
    HEADER,
    data_uri,
    on_white,
    picture_bytes,
    picture_from_bytes,
    picture_from_signed,
    picture_from_unit,
    picture_signed,
    tile_grid,
    titled_grid,
)


def test_every_byte_survives_a_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    picture = picture_from_bytes(values)
    assert torch.equal(picture_bytes(picture), values)
    assert picture_from_unit(values / 255) == picture
    assert picture_from_signed(picture_signed(picture)) == picture


def test_values_outside_the_range_are_clamped() -> None:
    image = torch.tensor([-0.5, 0.5, 1.5]).view(3, 1, 1)
    assert picture_from_unit(image).getpixel((0, 0)) == (0, 128, 255)  # 127.5 rounds to the even 128
    assert picture_from_signed(2 * image - 1).getpixel((0, 0)) == (0, 128, 255)


def test_one_channel_becomes_grey() -> None:
    assert picture_from_unit(torch.ones(1, 2, 2)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    picture = Image.new("RGBA", (1, 1), (0, 0, 0, 0)).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 0
        picture.putdata([0])
    assert on_white(picture).getpixel((0, 0)) == (255, 255, 255)


def test_titled_grid_places_rows_under_titles() -> None:
    grid = titled_grid(
        {"red": torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 32, 32), "black": torch.zeros(2, 3, 32, 32)}
    )
    assert grid.size == (2 * 32 + GAP, HEADER + 2 * 32 + GAP)
    assert grid.getpixel((0, HEADER)) == (255, 0, 0)
    assert grid.getpixel((32 + GAP, HEADER + 32 + GAP)) == (0, 0, 0)


def test_tile_grid_fills_rows_from_the_left() -> None:
    grid = tile_grid(torch.zeros(3, 3, 4, 4), columns=2, tile=8)
    assert grid.size == (16, 16)
    assert grid.getpixel((7, 15)) == (0, 0, 0)
    assert grid.getpixel((8, 15)) == (255, 255, 255)


def test_data_uri_holds_the_reduced_picture(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 32), "red").save(path)
    head, _, body = data_uri(path, size=16, quality=90).partition(",")
    assert head == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (16, 8)
