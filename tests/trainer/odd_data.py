"""Make odd pictures, captions and names, each with what must be read from it. The files are made on the spot.

The right values come from the definitions: EXIF's corners of row 0 and column 0, 65535 as white of 16 bits, white under
transparent pixels, CIE LAB of white and black.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, features

from flash_diffusion.trainer.config import DataSection
from flash_diffusion.trainer.data.reading import decode
from flash_diffusion.trainer.data.reading.samples import BadSample, RawSample, Sample, Source

Pixels = NDArray[np.uint8]
Color = tuple[int, int, int]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
WIDTH, HEIGHT = 24, 16  # of the upright picture


@dataclass(frozen=True)
class OddPicture:
    """A picture file, and what must be read from it.

    Attributes:
        content: bytes of the file.
        suffix: of the file's name.
        size: width and height, upright; None where the file must be refused.
        pixels: place (x, y) -> the colour there, to within `tolerance`.
        error: words of the error, for a file that must be refused.
        readable_header: the header tells a size, though the pixels are refused.
    """

    content: bytes
    suffix: str = "png"
    size: tuple[int, int] | None = (WIDTH, HEIGHT)
    pixels: Mapping[tuple[int, int], Color] = field(default_factory=dict)
    error: str = ""
    tolerance: int = 0
    readable_header: bool = False


CORNERS = {(2, 2): RED, (WIDTH - 3, 2): GREEN, (2, HEIGHT - 3): BLUE, (WIDTH - 3, HEIGHT - 3): WHITE}


def upright() -> Pixels:
    """Four quarters: red, green, blue, white."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = RED
    pixels[: HEIGHT // 2, WIDTH // 2 :] = GREEN
    pixels[HEIGHT // 2 :, : WIDTH // 2] = BLUE
    pixels[HEIGHT // 2 :, WIDTH // 2 :] = WHITE
    return pixels


def stored(orientation: int) -> Pixels:
    """The stored pixels of the upright picture: EXIF names the visual sides of row 0 and of column 0."""
    row_side, column_side = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    picture = upright()
    vertical, horizontal = (row_side, column_side) if orientation < 5 else (column_side, row_side)
    if vertical == "bottom":
        picture = picture[::-1]
    if horizontal == "right":
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture if orientation < 5 else picture.transpose(1, 0, 2))


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as a file's bytes."""
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def image(pixels: Pixels) -> Image.Image:
    """Pixels as a picture."""
    return Image.fromarray(pixels)


def exif(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels: Pixels, depth: int, color: int, *extra: bytes, size: tuple[int, int] | None = None) -> bytes:
    """A PNG file made by hand: rows of bytes, bit depth and colour type of the specification, further chunks."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    width, height = size or (pixels.shape[1], pixels.shape[0])
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + body + chunk(b"IEND", b"")


def after_header(content: bytes, *extra: bytes) -> bytes:
    """A PNG file with further chunks behind its header."""
    return content[:33] + b"".join(extra) + content[33:]


def grey16() -> NDArray[np.uint16]:
    """Black, 100 of 255, white and 30 of 255, in 16 bits, in four quarters."""
    values = np.zeros((HEIGHT, WIDTH), np.uint16)
    values[: HEIGHT // 2, WIDTH // 2 :] = 100 * 257
    values[HEIGHT // 2 :, : WIDTH // 2] = 65535
    values[HEIGHT // 2 :, WIDTH // 2 :] = 30 * 257
    return values


GREY_CORNERS = {place: (value,) * 3 for place, value in zip(CORNERS, (0, 100, 255, 30), strict=True)}
plain = image(upright())
HOLE_CORNERS = {**CORNERS, (2, 2): WHITE}  # red is transparent


def with_hole() -> Image.Image:
    """The upright picture with a transparent red quarter."""
    picture = plain.convert("RGBA")
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[: HEIGHT // 2, : WIDTH // 2] = 0
    picture.putalpha(image(alpha))
    return picture


def grey_hole(mode: str) -> Image.Image:
    """A black picture whose left half is transparent."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    picture = Image.new("LA", (WIDTH, HEIGHT), (0, 0))
    picture.putalpha(image(alpha))
    return picture.convert(mode)


def huge_text() -> bytes:
    """A PNG file with a compressed text of 80 MB."""
    text = b"Comment\0\0" + zlib.compress(b" " * 80_000_000, 9)
    return after_header(saved(plain, "PNG"), chunk(b"zTXt", text))


def lab_tiff() -> bytes:
    """Left half white, right half black, in CIE LAB; Pillow holds a and b with 128 added."""
    lab = Image.new("LAB", (WIDTH, HEIGHT), (255, 128, 128))
    lab.paste((0, 128, 128), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return saved(lab, "TIFF")


def cmyk() -> Image.Image:
    """Left half without ink, right half with all black ink."""
    picture = Image.new("CMYK", (WIDTH, HEIGHT), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (WIDTH // 2, 0, WIDTH, HEIGHT))
    return picture


HALVES = {(2, 2): WHITE, (WIDTH - 3, 2): BLACK}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def animated(kind: str) -> bytes:
    """The upright picture, then a black frame."""
    return saved(plain, kind, save_all=True, append_images=[Image.new("RGB", plain.size)], duration=100, lossless=True)


def damaged(content: bytes) -> bytes:
    """A file with other bytes in its middle."""
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 50 + content[middle + 50 :]


def pictures() -> dict[str, OddPicture]:
    """Return name -> odd picture."""
    red_hole = chunk(b"tRNS", struct.pack(">HHH", 255, 0, 0))
    red_hole_16 = chunk(b"tRNS", struct.pack(">HHH", 65535, 0, 0))
    deep = (upright().astype(np.uint16) * 257).astype(">u2")
    grey = grey16()
    big = grey.astype(">u2")
    palette = plain.quantize(4)
    transparent = palette.getpixel((2, 2))
    ppm = b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT) + big.tobytes()
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    good = {
        **{
            f"png-orientation-{number}": OddPicture(
                saved(image(stored(number)), "PNG", exif=exif(number)), pixels=CORNERS
            )
            for number in range(1, 9)
        },
        "jpeg-sideways": OddPicture(
            saved(image(stored(6)), "JPEG", exif=exif(6), quality=100, subsampling=0),
            "JPG",
            pixels=CORNERS,
            tolerance=6,
        ),
        "webp-sideways": OddPicture(
            saved(image(stored(8)), "WEBP", exif=exif(8), lossless=True), "webp", pixels=CORNERS
        ),
        "tiff-sideways": OddPicture(saved(image(stored(6)), "TIFF", exif=exif(6)), "tif", pixels=CORNERS),
        "png-sideways-behind-the-pixels": OddPicture(
            png(stored(6), 8, 2)[:-12] + chunk(b"eXIf", exif(6).tobytes()[6:]) + chunk(b"IEND", b""), pixels=CORNERS
        ),
        "png-sideways-by-xmp": OddPicture(
            after_header(
                saved(image(stored(8)), "PNG"),
                chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'),
            ),
            pixels=CORNERS,
        ),
        "orientation-out-of-range": OddPicture(saved(plain, "PNG", exif=exif(77)), pixels=CORNERS),
        "broken-exif": OddPicture(
            after_header(saved(plain, "PNG"), chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")), pixels=CORNERS
        ),
        "grey-16-bit": OddPicture(png(big, 16, 0), pixels=GREY_CORNERS),
        "grey-16-bit-with-a-hole": OddPicture(
            png(big, 16, 0, chunk(b"tRNS", struct.pack(">H", 100 * 257))),
            pixels={**GREY_CORNERS, (WIDTH - 3, 2): WHITE},
        ),
        "grey-16-bit-sideways": OddPicture(
            png(np.ascontiguousarray(big[:, ::-1].T), 16, 0, chunk(b"eXIf", exif(6).tobytes()[6:])), pixels=GREY_CORNERS
        ),
        "grey-16-bit-tiff": OddPicture(saved(Image.fromarray(grey), "TIFF"), "tiff", pixels=GREY_CORNERS),
        "grey-16-bit-big-endian-tiff": OddPicture(
            saved(Image.frombytes("I;16B", plain.size, big.tobytes()), "TIFF"), "tiff", pixels=GREY_CORNERS
        ),
        "grey-16-bit-pgm": OddPicture(ppm, "pgm", pixels=GREY_CORNERS),
        "color-16-bit": OddPicture(png(deep, 16, 2), pixels=CORNERS),
        "color-with-a-hole": OddPicture(png(upright(), 8, 2, red_hole), pixels=HOLE_CORNERS),
        "color-16-bit-with-a-hole": OddPicture(png(deep, 16, 2, red_hole_16), pixels=HOLE_CORNERS),
        "grey-with-a-hole": OddPicture(
            png(np.full((HEIGHT, WIDTH), 7, np.uint8), 8, 0, chunk(b"tRNS", struct.pack(">H", 7))),
            pixels={(2, 2): WHITE},
        ),
        "alpha": OddPicture(saved(with_hole(), "PNG"), pixels=HOLE_CORNERS),
        "alpha-webp": OddPicture(saved(with_hole(), "WEBP", lossless=True), "webp", pixels=HOLE_CORNERS),
        "alpha-tga": OddPicture(saved(with_hole(), "TGA"), "tga", pixels=HOLE_CORNERS),
        "grey-alpha": OddPicture(saved(grey_hole("LA"), "PNG"), pixels=HALVES),
        "palette": OddPicture(saved(palette, "PNG"), pixels=CORNERS),
        "palette-with-a-hole": OddPicture(saved(palette, "PNG", transparency=transparent), pixels=HOLE_CORNERS),
        "gif-with-a-hole": OddPicture(saved(palette, "GIF", transparency=transparent), "gif", pixels=HOLE_CORNERS),
        "one-bit": OddPicture(saved(Image.new("1", plain.size, 1), "PNG"), pixels={(2, 2): WHITE}),
        "cmyk-jpeg": OddPicture(saved(cmyk(), "JPEG", quality=100), "jpeg", pixels=HALVES, tolerance=6),
        "cmyk-tiff": OddPicture(saved(cmyk(), "TIFF"), "tif", pixels=HALVES),
        "cmyk-with-a-wrong-profile": OddPicture(saved(cmyk(), "TIFF", icc_profile=SRGB), "tif", pixels=HALVES),
        "lab-tiff": OddPicture(lab_tiff(), "tif", pixels=HALVES, tolerance=2),
        "animated-gif": OddPicture(animated("GIF"), "gif", pixels=CORNERS),
        "animated-png": OddPicture(animated("PNG"), "apng", pixels=CORNERS),
        "animated-webp": OddPicture(animated("WEBP"), "webp", pixels=CORNERS),
        "jpeg-2000": OddPicture(saved(plain, "JPEG2000"), "jp2", pixels=CORNERS, tolerance=2),
        "bitmap": OddPicture(saved(plain, "BMP"), "bmp", pixels=CORNERS),
        "portable-pixmap": OddPicture(saved(plain, "PPM"), "ppm", pixels=CORNERS),
        "named-png-but-jpeg": OddPicture(
            saved(plain, "JPEG", quality=100, subsampling=0), "png", pixels=CORNERS, tolerance=6
        ),
        "one-pixel": OddPicture(saved(Image.new("RGB", (1, 1), RED), "PNG"), size=(1, 1), pixels={(0, 0): RED}),
        "long-workflow": OddPicture(saved(plain, "PNG", pnginfo=text), pixels=CORNERS),
        "huge-text": OddPicture(huge_text(), pixels=CORNERS),
        "broken-profile": OddPicture(after_header(saved(plain, "PNG"), chunk(b"iCCP", b"x\0\0no")), pixels=CORNERS),
        "text-with-a-wrong-checksum": OddPicture(
            after_header(saved(plain, "PNG"), chunk(b"tEXt", b"Comment\0x")[:-1] + b"?"), pixels=CORNERS
        ),
    }
    if features.check("avif"):  # since Pillow 11.3
        options = {"quality": 100, "subsampling": "4:4:4"}
        sideways = saved(image(stored(6)), "AVIF", exif=exif(6), **options)
        good["avif"] = OddPicture(saved(plain, "AVIF", **options), "avif", pixels=CORNERS, tolerance=6)
        good["avif-sideways"] = OddPicture(sideways, "avif", pixels=CORNERS, tolerance=6)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    bad = {
        "no-bytes": OddPicture(b"", error="empty"),
        "no-picture": OddPicture(
            b"<!DOCTYPE html><html>404</html>", "jpg", error="no picture in a format that is read"
        ),
        "cut-png": OddPicture(saved(image(noise), "PNG")[:3000], error="is not a readable image", readable_header=True),
        "cut-jpeg": OddPicture(saved(image(noise), "JPEG")[:900], "jpg", error="truncated", readable_header=True),
        "damaged-lzw": OddPicture(
            damaged(saved(image(noise), "TIFF", compression="tiff_lzw")),
            "tif",
            error="its content is damaged",
            readable_header=True,
        ),
        "cut-header": OddPicture(saved(plain, "PNG")[:20], error="is not a readable image"),
        "bomb": OddPicture(png(upright(), 8, 2, size=(60000, 60000)), error="million pixels"),
        "postscript": OddPicture(saved(plain, "EPS"), error="no picture in a format that is read"),
        "float-tiff": OddPicture(
            saved(Image.new("F", plain.size, 0.5), "TIFF"), "tif", error="8 or 16 bits", readable_header=True
        ),
        "32-bit-tiff": OddPicture(
            saved(Image.new("I", plain.size, 70000), "TIFF"), "tif", error="8 or 16 bits", readable_header=True
        ),
    }
    refused = {
        name: OddPicture(odd.content, odd.suffix, None, {}, odd.error, 0, odd.readable_header)
        for name, odd in bad.items()
    }
    return {**good, **refused}


@dataclass(frozen=True)
class OddCaption:
    """Caption files beside a picture, and the captions that must be read from them.

    Attributes:
        files: ending -> content of the file beside the picture.
        captions: the right captions; None where the sample must be refused.
        error: words of the error.
        field: data.caption_field.
    """

    files: Mapping[str, bytes]
    captions: tuple[str, ...] | None = None
    error: str = ""
    field: str | None = None


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


CAPTIONS = {
    "plain": OddCaption({"txt": b"a fox"}, ("a fox",)),
    "upper case": OddCaption({"TXT": b"a fox"}, ("a fox",)),
    "empty": OddCaption({"txt": b""}, ("",)),
    "blank lines around": OddCaption({"txt": b"\n\n a fox \r\n\n"}, ("a fox",)),
    "two lines": OddCaption({"txt": b"a fox\nin snow"}, ("a fox\nin snow",)),
    "UTF-8 with a mark": OddCaption({"txt": "\ufeffein Füchslein".encode()}, ("ein Füchslein",)),
    "UTF-16, little end first": OddCaption({"txt": "\ufeff狐".encode("utf-16-le")}, ("狐",)),
    "UTF-16, big end first": OddCaption({"txt": "\ufeff狐".encode("utf-16-be")}, ("狐",)),
    "UTF-32": OddCaption({"txt": "\ufeff狐".encode("utf-32-le")}, ("狐",)),
    "Latin-1": OddCaption({"txt": "Füchslein".encode("latin-1")}, error="not UTF-8"),
    "half of UTF-16": OddCaption({"txt": b"\xff\xfea"}, error="not UTF-8"),
    ".caption": OddCaption({"caption": b"a fox"}, ("a fox",)),
    ".txt before .caption": OddCaption({"caption": b"old", "txt": b"a fox"}, ("a fox",)),
    "JSON text": OddCaption({"json": _json("a fox")}, ("a fox",)),
    "JSON list": OddCaption({"json": _json(["a fox", "fox"])}, ("a fox", "fox")),
    "JSON object": OddCaption({"json": _json({"caption": "a fox", "width": 3})}, ("a fox",)),
    "JSON object with a list": OddCaption({"json": _json({"captions": ["a fox", "fox"]})}, ("a fox", "fox")),
    "JSON with a mark": OddCaption({"json": b"\xef\xbb\xbf" + _json({"text": "a fox"})}, ("a fox",)),
    "JSON beside .txt": OddCaption({"txt": b"a fox", "json": _json({"caption": "x"})}, ("a fox",)),
    "JSON field": OddCaption({"txt": b"x", "json": _json({"long": "a fox", "caption": "x"})}, ("a fox",), field="long"),
    "JSON without the field": OddCaption({"json": _json({"caption": "x"})}, error="data.caption_field", field="long"),
    "JSON without a caption": OddCaption({"json": _json({"width": 3})}, error="data.caption_field"),
    "JSON without a caption, and .txt": OddCaption({"json": _json({"width": 3}), "txt": b"a fox"}, ("a fox",)),
    "JSON null": OddCaption({"json": _json(None)}, error="no caption"),
    "JSON empty list": OddCaption({"json": _json([])}, error="no caption"),
    "JSON number": OddCaption({"json": _json({"caption": 3})}, error="holds in the field 'caption' 3"),
    "JSON list of numbers": OddCaption({"json": _json([3, "x"])}, error="expected a text or a list of texts"),
    "JSON half of a character": OddCaption({"json": b'"\\ud800"'}, error="half of a character"),
    "no JSON": OddCaption({"json": b"{"}, error="is not JSON"),
    "deep JSON": OddCaption({"json": b"[" * 100_000}, error="is not JSON"),
    "no caption": OddCaption({}, error="has no caption"),
}

# Tables of captions: 1.png is a fox twice, deep/2.png is a dog.
TABLES = {
    "metadata.jsonl": b'{"file_name": "1.png", "text": "a fox"}\n\n{"file_name": "deep/2.png", "text": "a dog"}\n'
    b'{"file_name": "1.png", "text": "fox"}\n',
    "metadata.csv": b'\xef\xbb\xbffile_name,width,text\n1.png,8,a fox\n"deep/2.png",8,"a dog"\n1.png,8,fox\n',
    "captions.json": b'{"1.png": ["a fox", "fox"], "deep/2": {"caption": "a dog"}}',
}

# Names of pictures, each with a caption of its own: all are samples, in a folder and in a shard.
NAMES = (
    *("IMG_1.png", "v1.5_fox.png", "v1.6_fox.png", "photo.of.dog.png", "0001.PNG", "mask.png", "a b.png", "日本.png"),
    *("x.png.png", "deep/er/0001.png", "deep/v1.5.png", "mask.d/1.png", "fox-1.png", "fox.png"),
)
# Names that are no samples.
NO_SAMPLES = ("._0001.png", "__MACOSX/._0001.png", ".thumbnails/0001.png")


def shard(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar file of members in order."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
    """Files below a folder."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


Writer = Callable[[Path, Mapping[str, bytes]], Path]
WRITERS: dict[str, Writer] = {
    "folder": lambda path, files: folder(path / "folder", files),
    "webdataset": lambda path, files: shard(path / "a.tar", files),
}


PNG = saved(plain, "PNG")
SOURCES = tuple(WRITERS)


def section(source: str, path: Path, **fields: Any) -> DataSection:
    """A data section."""
    return DataSection.model_validate({"source": source, "path": path, **fields})


def raw_samples(source: Source) -> list[RawSample | BadSample]:
    """All samples of a source, and those that can't be used."""
    return [sample for unit in range(len(source)) for sample in source.read(unit)]


def decoded(sample: RawSample | BadSample) -> Sample | BadSample:
    """A decoded sample, or why it can't be."""
    if isinstance(sample, BadSample):
        return sample
    try:
        return decode(sample)
    except BadSample as problem:
        return problem
