"""Decode picture files: upright, RGB, on white; the first frame of animations. Every failure names the file."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from ...pictures import on_white
from .names import format_order
from .samples import SAME_SIZE, BadSample, RawSample, Sample

# A photograph of 100 million pixels is no attack: Pillow's error, at twice the size of its warning, is enough.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged EXIF data and the like; they name no file

Result = TypeVar("Result")

ORIENTATION = 0x0112  # EXIF tag
# EXIF orientation -> what turns the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
UNEXPLAINED = re.compile(r"(decoder error )?-?\d*")  # errors of Pillow's decoders that are only a number
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_EXIF = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where a PNG file may name its orientation
PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")


def decode(raw: RawSample) -> Sample:
    """Return a sample with its pictures decoded.

    Raises:
        BadSample: a picture is unreadable, or a mask or hint has another size than its picture.
    """
    image = _decoded(raw, _picture(raw), raw.name)
    beside = {name: _decoded(raw, content, f"the {name} of {raw.name}") for name, content in raw.companions.items()}
    for name, companion in beside.items():
        _check_size(raw, name, companion.size, image.size)
    return Sample(raw.name, image, raw.captions, beside)


def picture_size(raw: RawSample) -> tuple[int, int]:
    """Return width and height of a sample's picture, upright, from the file's header.

    The headers of the companions are read too, so that most wrong samples are found before pixels are decoded.

    Raises:
        BadSample: a header is unreadable, or a mask or hint has another size than its picture.
    """
    size = _size(raw, _picture(raw), raw.name)
    for name, content in raw.companions.items():
        _check_size(raw, name, _size(raw, content, f"the {name} of {raw.name}"), size)
    return size


def _picture(raw: RawSample) -> bytes | Image.Image:
    if raw.picture is None:
        raise BadSample(raw.name, f"{raw.name} is a prompt without a picture, and a picture is needed here")
    return raw.picture


def _check_size(raw: RawSample, name: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if name in SAME_SIZE and size != expected:
        raise BadSample(
            raw.name,
            f"the {name} beside {raw.name} has {size[0]} x {size[1]} pixels, and the picture has "
            f"{expected[0]} x {expected[1]}; make them the same size",
            "companion",
        )


def _decoded(raw: RawSample, content: bytes | Image.Image, name: str) -> Image.Image:
    if isinstance(content, Image.Image):
        return content
    with _explained(raw, name):
        return _with_picture(content, _upright)


def _size(raw: RawSample, content: bytes | Image.Image, name: str) -> tuple[int, int]:
    if isinstance(content, Image.Image):
        return content.size
    with _explained(raw, name):
        return _with_picture(content, partial(_upright_size, content))


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()
    turn = UPRIGHT.get(_orientation(picture))
    upright = on_white(picture)
    return upright if turn is None else upright.transpose(turn)


def _upright_size(content: bytes, picture: Image.Image) -> tuple[int, int]:
    # To look for EXIF data behind the pixels, Pillow decodes a PNG file.
    if picture.format == "PNG" and not any(mark in content for mark in PNG_EXIF):
        return picture.size
    orientation = _orientation(picture)
    if picture.format == "TIFF" and orientation != 1:
        picture.load()  # Pillow turns a TIFF while it loads, and releases differ in the size that they give before
        return picture.size
    width, height = picture.size
    return (height, width) if orientation in SIDEWAYS else (width, height)


@contextmanager
def _explained(raw: RawSample, name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a BadSample that names the file. On damaged bytes decoders raise anything."""
    try:
        yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise BadSample(
            raw.name, f"{name} has more than {most} million pixels, which no camera makes; reduce or remove it"
        ) from error
    except Exception as error:
        raise BadSample(raw.name, f"{name} is not a readable image ({_reason(error)}); remove or replace it") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return str(error) if "BytesIO" not in text else "its bytes are no picture in a format that is read"
    if "BytesIO" in text or UNEXPLAINED.fullmatch(text):
        return "its content is damaged"
    return text


def _with_picture(content: bytes, work: Callable[[Image.Image], Result]) -> Result:
    """Return ``work`` of the opened picture. A PNG file with texts that Pillow refuses is opened without them."""
    if not content:
        raise UnidentifiedImageError("the file is empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(content), formats=format_order()) as picture:
            return work(picture)
    except Exception:
        if not content.startswith(PNG_SIGNATURE):
            raise
        with Image.open(io.BytesIO(_png_pixels(content)), formats=("PNG",)) as picture:
            return work(picture)


def _png_pixels(content: bytes) -> bytes:
    """Return a PNG file with only the chunks that its pixels need."""
    kept, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place + 8 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        end = place + length + 12
        if content[place + 4 : place + 8] in PNG_NEEDED:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none or where the EXIF data is damaged."""
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, EOFError, struct.error):
        return 1  # viewers show such a picture as it is stored
    return orientation if isinstance(orientation, int) else 1
