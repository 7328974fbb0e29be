"""Convert pictures between tensors and Pillow, lay them on white, arrange them in grids, embed them in pages.

A tensor picture is (3, H, W): "unit" in [0, 1], "signed" in [-1, 1], or uint8.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform
    from torch import Tensor

GAP = 4  # pixels between pictures of a grid
HEADER = 18  # pixels for a column's title
FONT_SIZE = 12  # pixels


def picture_from_unit(image: Tensor) -> Image.Image:
    """Return a picture (3, H, W) or (1, H, W) in [0, 1] as RGB with 8 bits a channel."""
    return picture_from_bytes((image * 255).round().clamp(0, 255).byte())


def picture_from_signed(image: Tensor) -> Image.Image:
    """Return a picture (3, H, W) or (1, H, W) in [-1, 1] as RGB with 8 bits a channel."""
    return picture_from_bytes(((image + 1) * 127.5).round().clamp(0, 255).byte())


def picture_from_bytes(image: Tensor) -> Image.Image:
    """Return a picture (3, H, W) or (1, H, W), uint8, as RGB."""
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())


def picture_bytes(picture: Image.Image) -> Tensor:
    """Return an RGB picture as (3, H, W) uint8. Divide by 255 for [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def picture_signed(picture: Image.Image) -> Tensor:
    """Return an RGB picture as (3, H, W) float32 in [-1, 1]."""
    return picture_bytes(picture).float() / 127.5 - 1


def on_white(picture: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB, with white where the picture is transparent.

    Raises:
        ValueError: the picture has 32 bits a channel, where no number is known to be white.
    """
    if picture.mode in ("I", "F") and picture.format not in ("PNG", "PPM"):
        raise ValueError("its pixels have 32 bits, without a known white; save it with 8 or 16 bits a channel")
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits a channel")
    if picture.mode.startswith("I"):
        return _from_16_bits(picture)
    if picture.mode in ("CMYK", "LAB"):
        return _to_srgb(picture)
    if picture.mode in ("RGB", "L", "1"):
        transparent = picture.info.get("transparency")
        if transparent is None:
            return picture.convert("RGB")
        if isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits; Pillow keeps the upper 8 of pixels
            picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif picture.mode not in ("RGBA", "RGBa", "LA", "La", "PA", "P"):
        return picture.convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits as RGB: 65535 is white, so values are divided by 257."""
    import numpy as np

    values = np.asarray(picture).astype(np.int64)
    grey = (values.clip(0, 65535) + 128) // 257
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Return a CMYK or LAB picture as RGB: by its colour profile if it has a readable one, by a formula otherwise."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    srgb = ImageCms.createProfile("sRGB")
    if picture.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return _converted(picture, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    if profile is None:
        return picture.convert("RGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(own, srgb, "CMYK", "RGB")
    except (ImageCms.PyCMSError, OSError):
        return picture.convert("RGB")  # a profile that is damaged, or of another kind of picture
    return _converted(picture, transform)


def _converted(picture: Image.Image, transform: ImageCmsTransform) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(picture, transform)
    assert converted is not None  # only None in place
    return converted


def titled_grid(columns: Mapping[str, Tensor]) -> Image.Image:
    """Return a grid with one titled column for each entry: pictures (R, 3, H, W) in [0, 1]."""
    rows, _, height, width = next(iter(columns.values())).shape
    size = (len(columns) * (width + GAP) - GAP, HEADER + rows * (height + GAP) - GAP)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=FONT_SIZE)
    for column, (title, pictures) in enumerate(columns.items()):
        left = column * (width + GAP)
        draw.text((left + 2, 1), title, fill="black", font=font)
        for row, picture in enumerate(pictures):
            grid.paste(picture_from_unit(picture), (left, HEADER + row * (height + GAP)))
    return grid


def tile_grid(pictures: Tensor | Sequence[Tensor], columns: int, tile: int) -> Image.Image:
    """Return pictures (N, 3, H, W) in [0, 1] side by side, row by row, each resized to ``tile`` x ``tile`` pixels."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * tile, rows * tile), "white")
    for index, image in enumerate(pictures):
        picture = picture_from_unit(image).resize((tile, tile), Image.Resampling.LANCZOS)
        sheet.paste(picture, (index % columns * tile, index // columns * tile))
    return sheet


def data_uri(path: Path, size: int, quality: int) -> str:
    """Return a picture file as a ``data:`` URI, a WebP file that a page can hold.

    Args:
        path: the picture file.
        size: longest side in pixels; a larger picture is reduced.
        quality: of the WebP file, 0 to 100.
    """
    with Image.open(path) as picture:
        return picture_uri(picture, size, quality)


def picture_uri(picture: Image.Image, size: int, quality: int) -> str:
    """Return a picture as a ``data:`` URI, as :func:`data_uri` does. The picture itself is reduced."""
    picture.thumbnail((size, size))
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "WEBP", quality=quality, method=6)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
