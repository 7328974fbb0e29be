"""Read pictures with captions in a fixed order, from a folder, WebDataset shards, or the demo's shard.

A picture may have companions, pictures that a task reads: ``0001.mask.png`` beside ``0001.png``. Nothing is extracted
to disk: the members of a shard are read from its bytes, so their paths cannot do harm.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..config import DataSection
from ..demo.shards import load_pictures, read_records
from ..demo.swaps import swaps
from ..errors import UserError
from ..pictures import on_white, picture_from_bytes, picture_from_signed, picture_signed

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
COMPANIONS = ("mask", "identity", "hint")  # pictures that belong to another picture and are no samples
SAME_SIZE = ("mask", "hint")  # companions that have as many pixels as their picture


@dataclass(frozen=True)
class Sample:
    """A picture with its caption.

    Attributes:
        name: file or record of the picture, for messages.
        image: RGB, on white where it was transparent.
        caption: text, may be empty.
        companions: name -> RGB picture, for the requested companions that exist.
    """

    name: str
    image: Image.Image
    caption: str
    companions: Mapping[str, Image.Image] = field(default_factory=dict)


def check_source(data: DataSection) -> None:
    """Check that the first sample can be read, before a model is loaded.

    Raises:
        UserError: the data is missing or unreadable; the message names the path.
    """
    next(read_samples(data), None)


def read_samples(data: DataSection, companions: Sequence[str] = ()) -> Iterator[Sample]:
    """Yield the samples of a recipe's data, in a fixed order.

    Args:
        companions: names of ``COMPANIONS`` to read; of each name, every sample has a picture or no sample has.

    Raises:
        UserError: no data, an image without a caption, an unreadable image, a companion that only some pictures have,
            or a companion with another size than its picture; the message names the file.
    """
    if data.source == "demo":
        samples = _demo()
    elif data.source == "demo-swaps":
        samples = _demo_swaps(companions)
    else:
        assert data.path is not None  # the recipe was checked
        read = (
            _folder(data.path, companions) if data.source == "folder" else _webdataset(_shards(data.path), companions)
        )
        samples = _checked(read, companions)
    return islice(samples, data.limit)


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return a picture as (3, H, W) in [-1, 1]: scaled until it covers ``size`` = (H, W), then cut at the centre."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        # At least as large as the target in both directions, whatever the rounding.
        fitted = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(fitted, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return picture_signed(image)


def to_mask(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Return a mask as (1, H, W) in [0, 1], 1 for white, scaled and cut as :func:`to_tensor` does."""
    return to_tensor(image.convert("L").convert("RGB"), size)[:1] / 2 + 0.5


def _demo() -> Iterator[Sample]:
    """Yield every picture twice: with its name ("fox") and with its general caption ("animal face")."""
    pictures = load_pictures()
    for picture, caption in zip(pictures.images, pictures.captions, strict=True):
        image = picture_from_bytes(picture)
        for text in (caption.name, caption.general):
            yield Sample(f"{caption.code} of the demo", image, text)


def _demo_swaps(companions: Sequence[str]) -> Iterator[Sample]:
    """Yield the demo's swaps, with mask and identity as companions."""
    for swap in swaps():
        beside = {"mask": swap.mask * 2 - 1, "identity": swap.identity}
        pictures = {name: picture_from_signed(beside[name]) for name in companions if name in beside}
        yield Sample(swap.name, picture_from_signed(swap.image), f"{swap.head} with the face of {swap.face}", pictures)


def _checked(samples: Iterator[Sample], companions: Sequence[str]) -> Iterator[Sample]:
    """Yield the samples, and check that all have the same companions, of the right size."""
    first: Sample | None = None
    for sample in samples:
        first = first or sample
        for name in companions:
            if (name in sample.companions) != (name in first.companions):
                lacking, having = (sample, first) if name in first.companions else (first, sample)
                raise UserError(
                    f"{lacking.name} has no {name} picture beside it, and {having.name} has one; give every picture "
                    f"its .{name}.png, or remove them all, and the task draws its own"
                )
        for name in SAME_SIZE:
            if name in sample.companions and sample.companions[name].size != sample.image.size:
                width, height = sample.companions[name].size
                raise UserError(
                    f"the {name} beside {sample.name} has {width} x {height} pixels, and the picture "
                    f"has {sample.image.width} x {sample.image.height}; make them the same size"
                )
        yield sample


def _folder(folder: Path, companions: Sequence[str]) -> Iterator[Sample]:
    if not folder.is_dir():
        raise UserError(
            f"data.path: there is no folder {folder}; give a folder of images with a .txt caption beside each"
        )
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    beside = {path.stem: path for path in pictures if Path(path.stem).suffix.lstrip(".") in COMPANIONS}
    images = [path for path in pictures if path.stem not in beside]
    if alone := beside.keys() - {f"{path.stem}.{name}" for path in images for name in COMPANIONS}:
        lost = beside[min(alone)]
        raise UserError(
            f"{lost} has the name of a companion ({', '.join(COMPANIONS)}), but there is no picture "
            f"{Path(lost.stem).stem}.*; rename it, or put it beside its picture"
        )
    if not images:
        raise UserError(
            f"data.path: no images in {folder}; expected {', '.join(IMAGE_SUFFIXES)} with a .txt caption beside each"
        )
    for path in images:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"{path} has no caption; write one into {caption.name} beside it (an empty file is fine)")
        found = {name: beside[f"{path.stem}.{name}"] for name in companions if f"{path.stem}.{name}" in beside}
        yield Sample(
            str(path),
            _decode(path.read_bytes(), str(path)),
            _text(caption.read_bytes(), str(caption)),
            {name: _decode(other.read_bytes(), str(other)) for name, other in found.items()},
        )


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    shards = sorted(shard for shard in path.glob("*") if shard.name.endswith(SHARD_SUFFIXES)) if path.is_dir() else []
    if not shards:
        raise UserError(
            f"data.path: no shards at {path}; expected {', '.join(SHARD_SUFFIXES)} files, or a folder of them"
        )
    return shards


def _webdataset(shards: list[Path], companions: Sequence[str]) -> Iterator[Sample]:
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"data.path: there is no shard {shard}")
        # Every process reads every sample and takes its own share of each batch later, so that the order does not
        # depend on the number of processes.
        found = False
        try:
            for record in read_records(shard):
                name = f"{record['__key__']} in {shard.name}"
                picture = _member(record)
                if picture is None:
                    if lost := next((name for name in COMPANIONS if _member(record, name) is not None), None):
                        raise UserError(
                            f"{name} has a {lost} picture, but no picture that the {lost} belongs to; add the picture"
                        )
                    continue
                if "txt" not in record:
                    raise UserError(f"{name} has no caption; expected a .txt beside the image")
                found = True
                beside = {
                    companion: _decode(content, f"the {companion} of {name}")
                    for companion in companions
                    if (content := _member(record, companion)) is not None
                }
                yield Sample(name, _decode(picture, name), _text(record["txt"], name), beside)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:  # ValueError: two members of one name
            raise UserError(
                f"the shard {shard} can't be read ({error}); it may be truncated, or not a tar file"
            ) from error
        if not found:
            raise UserError(
                f"the shard {shard} holds no images; expected {', '.join(IMAGE_SUFFIXES)} with .txt captions"
            )


def _member(record: Mapping[str, bytes], companion: str | None = None) -> bytes | None:
    """Return the bytes of a record's picture (``png``) or companion (``mask.png``), None without one."""
    keys = (suffix if companion is None else f"{companion}.{suffix}" for suffix in IMAGE_SUFFIXES)
    return next((record[key] for key in keys if key in record), None)


def _decode(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content))
        return on_white(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not a readable image ({error}); remove or replace it") from error


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the caption of {name} is not UTF-8 text ({error}); save it as UTF-8") from error
