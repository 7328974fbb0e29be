"""Read pictures with captions from folders, shards, lists of prompts and the demo: one source for each kind."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from ...config import DataSection
from ...config.data import is_url
from ...errors import UserError
from .names import PROMPT_SUFFIXES, SHARD_SUFFIXES, not_read
from .samples import BadSample, Problems, RawSample, Sample, Source

__all__ = ["check_source", "decode", "open_source", "picture_size", "read_samples", "source_of"]

logger = logging.getLogger(__name__)


def open_source(data: DataSection, companions: Sequence[str] = (), strict: bool = True) -> Source:
    """Return the source of a recipe's data. Files are listed, and no picture is read.

    Args:
        companions: names of ``COMPANIONS`` to read.
        strict: a sample with other companions than the first sample can't be used.

    Raises:
        UserError: there is no data; the message names the path.
    """
    if data.source in ("demo", "demo-swaps"):
        from .embedded import Demo, DemoSwaps

        return Demo(data) if data.source == "demo" else DemoSwaps(data, companions)
    from .prompts import Prompts

    if data.source == "demo-glyphs":
        from ...demo.assets import GLYPH_CAPTIONS

        return Prompts(data, GLYPH_CAPTIONS)
    assert data.path is not None  # the recipe was checked
    if data.source == "webdataset":
        from .shards import Shards

        return Shards(data, data.path, companions, strict)
    assert isinstance(data.path, Path)  # the recipe was checked
    path = data.path.expanduser()
    if data.source == "folder":
        from .folder import Folder

        return Folder(data, path, companions, strict)
    return Prompts(data, path)


def source_of(location: Path | str) -> Literal["folder", "webdataset", "prompts"]:
    """Return the source that a path, pattern or URL looks like.

    Raises:
        UserError: there is no such file or folder.
    """
    path = Path(location).expanduser()
    if is_url(str(location)) or ("{" in str(location) and not path.exists()):
        return "webdataset"
    if not path.exists():
        raise UserError(f"there is no {path}; give a folder of pictures, a shard, a folder of shards, or prompts")
    if path.is_dir():
        return "webdataset" if any(file.name.endswith(SHARD_SUFFIXES) for file in path.iterdir()) else "folder"
    return "prompts" if path.suffix.lower() in PROMPT_SUFFIXES else "webdataset"


def decode(raw: RawSample) -> Sample:
    """Return a sample with its pictures decoded: RGB, upright, on white.

    Raises:
        BadSample: a picture is unreadable, or a mask or hint has another size than its picture.
    """
    from .decoding import decode

    return decode(raw)


def picture_size(raw: RawSample) -> tuple[int, int]:
    """Return width and height of a sample's picture, upright, from the file's header.

    Raises:
        BadSample: a header is unreadable, or a mask or hint has another size than its picture.
    """
    from .decoding import picture_size

    return picture_size(raw)


def read_samples(data: DataSection, companions: Sequence[str] = ()) -> Iterator[Sample]:
    """Yield the first ``data.limit`` samples of a recipe's data, decoded, in a fixed order.

    Raises:
        UserError: there is no data.
        BadSample: a sample can't be used, and ``data.on_error`` is fail.
    """
    return islice(_usable(open_source(data, companions), data), data.limit)


def _usable(source: Source, data: DataSection) -> Iterator[Sample]:
    problems = Problems(source.title, True, data.skip_limit)
    total = 0
    for unit in range(len(source)):
        for raw in source.read(unit):
            total += 1
            try:
                if isinstance(raw, BadSample):
                    raise raw
                sample = decode(raw)
            except BadSample as problem:
                if data.on_error == "fail":
                    raise
                problems.add(str(problem))
                continue
            yield sample
    problems.check(total)
    if problems.count:
        logger.warning(problems.summary(total))


def check_source(data: DataSection) -> None:
    """Check that there are samples, and that the first one can be read, before a model is loaded.

    Raises:
        UserError: the data is missing or unreadable; the message names the path.
    """
    source = open_source(data)
    if sentence := not_read(source.left_out.suffixes):
        logger.warning("%s: %s", source.title, sentence)
    if source.left_out.empty:
        logger.warning("%s: %d empty prompts are left out", source.title, source.left_out.empty)
    if data.source in ("prompts", "demo-glyphs"):
        return
    next(_usable(source, data), None)
