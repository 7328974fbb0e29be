"""Manifests: what a source holds is read once, and a damaged manifest is read again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flash_diffusion.trainer.config import DataSection
from flash_diffusion.trainer.data.cache.manifest import Manifest, Manifests, content_key, scan_unit
from flash_diffusion.trainer.data.reading import open_source
from flash_diffusion.trainer.data.reading.samples import BadSample, RawSample
from flash_diffusion.trainer.interrupts import StopRequest


@pytest.fixture
def manifests(tmp_path: Path) -> Manifests:
    """A picture of 48 x 32, one that is turned upright, and a broken one, with masks."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    for name, options in (("a", {}), ("b", {"exif": exif})):
        for ending in ("jpg", "mask.jpg"):
            Image.new("RGB", (48, 32), "red").save(folder / f"{name}.{ending}", **options)
        (folder / f"{name}.txt").write_text(f"caption {name} \u00e9\U0001f600", encoding="utf-8")
    (folder / "c.jpg").write_bytes(b"no picture")
    (folder / "c.txt").write_text("caption c")
    (folder / "c.mask.jpg").write_bytes(b"no picture")
    source = open_source(DataSection(source="folder", path=folder), ("mask",))
    return Manifests(tmp_path / "manifests", source, ("mask",), "reading")


def assert_equal(one: Manifest, other: Manifest) -> None:
    for first, second in (
        (one.content, other.content),
        (one.sizes, other.sizes),
        (one.beside["mask"], other.beside["mask"]),
    ):
        assert first.dtype == second.dtype
        assert np.array_equal(first, second)
    assert (one.captions, one.problems) == (other.captions, other.problems)
    assert one.beside.keys() == other.beside.keys()


def reads(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by each unit that is read."""
    units: list[int] = []
    original = manifests.source.read

    def read(unit: int) -> Iterator[RawSample | BadSample]:
        units.append(unit)
        return original(unit)

    monkeypatch.setattr(manifests.source, "read", read)
    return units


def test_a_source_is_read_once_until_a_file_changes(manifests: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    read = reads(manifests, monkeypatch)
    manifests.prepare(range(1), StopRequest())
    manifest = manifests.load(0)
    assert read == [0]
    path = manifests.source.path  # type: ignore[attr-defined]
    assert manifest.sizes.tolist() == [[48, 32], [32, 48]]
    assert [key.tobytes() for key in manifest.content] == [
        content_key((path / f"{name}.jpg").read_bytes()) for name in "ab"
    ]
    assert manifest.captions == [["caption a \u00e9\U0001f600"], ["caption b \u00e9\U0001f600"]]
    assert [Path(name).name for name, _ in manifest.problems] == ["c.jpg"]
    assert_equal(manifest, scan_unit(manifests.source, 0, ("mask",)))
    (path / "a.txt").write_text("a longer caption than before")
    assert manifests.load(0).captions[0] == ["a longer caption than before"]
    manifests.forget(0)
    read.clear()
    assert len(manifests.load(0)) == 2
    assert read == [0]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_as_manifest_are_read_again(manifests: Manifests, content: bytes) -> None:
    wanted = manifests.load(0)
    path = manifests.path(0)
    assert path is not None
    path.write_bytes(content)
    assert_equal(manifests.load(0), wanted)
    assert_equal(manifests.load(0), wanted)  # the file is whole again


def test_no_flipped_byte_gives_another_manifest(manifests: Manifests) -> None:
    """Names, dtypes and shapes of a manifest's arrays are in its header, beside the hash of what they hold."""
    wanted = manifests.load(0)
    path = manifests.path(0)
    assert path is not None
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(header), *range(header, len(content), 29)]:
        for flip in (0x0F, 0x1C):  # "I32" ^ 0x0f is "F32", "U8" ^ 0x1c is "I8"
            path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            assert_equal(manifests.load(0), wanted)
