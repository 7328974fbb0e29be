"""Any bytes as picture, caption, shard or table give the right value or our error, never another exception."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from flash_diffusion.trainer.data.reading import open_source, picture_size
from flash_diffusion.trainer.data.reading.samples import BadSample, RawSample
from flash_diffusion.trainer.data.reading.shards import samples_of
from flash_diffusion.trainer.errors import UserError

from .odd_data import (
    CAPTIONS,
    PNG,
    TABLES,
    decoded,
    folder,
    plain,
    raw_samples,
    saved,
    section,
    shard,
)

SEEDS = [saved(plain, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "TGA", "ICO", "PPM")]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Bytes of no format, or of a file that was changed somewhere and cut somewhere."""
    content = bytearray(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(0, 8))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        content[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(content[: draw(st.integers(0, len(content))) or None])


@contextmanager
def names_on_error(name: str) -> Iterator[None]:
    """Let UserErrors pass that name a file; all other exceptions are failures."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = error
    assert problem is None or name in str(problem)


@given(mutated(SEEDS))
@settings(max_examples=400, deadline=None)
def test_any_bytes_as_picture_give_a_picture_or_our_error(content: bytes) -> None:
    raw = RawSample("1.png", content, ("",), {"identity": content})
    sample = decoded(raw)
    if isinstance(sample, BadSample):
        assert "1.png" in str(sample)
        assert "BytesIO" not in str(sample)
    else:
        assert sample.image.mode == "RGB"
        assert picture_size(raw) == sample.image.size


@given(mutated([content for odd in CAPTIONS.values() for content in odd.files.values() if len(content) < 1000]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_as_caption_give_texts_or_our_error(content: bytes) -> None:
    for ending in ("txt", "caption", "json"):
        for sample in samples_of("1", [("1.png", PNG), (f"1.{ending}", content)], "a.tar"):
            if isinstance(sample, RawSample):
                assert sample.captions
                assert all(text.encode().decode() == text for text in sample.captions)
            else:
                assert "1 in a.tar" in str(sample)


def tar_bytes(mode: str) -> bytes:
    """A shard's bytes."""
    with tempfile.TemporaryDirectory() as root:
        return shard(
            Path(root) / "a.tar", {"1.png": PNG, "1.txt": b"a fox", "v1.2.png": PNG, "v1.2.txt": b""}, mode
        ).read_bytes()


@given(mutated([tar_bytes("w"), tar_bytes("w:gz")]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_as_shard_give_samples_or_our_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "a.tar"
        path.write_bytes(content)
        with names_on_error("a.tar"):
            for sample in raw_samples(open_source(section("webdataset", path))):
                decoded(sample)


@given(st.sampled_from(sorted(TABLES)), mutated(list(TABLES.values())))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_table_give_captions_or_our_error(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = folder(Path(root), {"1.png": PNG, name: content})
        for source, target in (("folder", path), ("prompts", path / name)):
            with names_on_error(name):
                raw_samples(open_source(section(source, target)))
