"""Odd pictures, captions and names: folder and shard give the right value of each, or name what is wrong."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from flash_diffusion.trainer.data.reading import check_source, open_source, picture_size, read_samples
from flash_diffusion.trainer.data.reading.folder import UNIT
from flash_diffusion.trainer.data.reading.names import format_order, not_read, picture_formats
from flash_diffusion.trainer.data.reading.samples import BadSample, LeftOut, Problems, RawSample, Sample
from flash_diffusion.trainer.errors import UserError

from .odd_data import (
    CAPTIONS,
    HEIGHT,
    NAMES,
    NO_SAMPLES,
    PNG,
    SOURCES,
    TABLES,
    WIDTH,
    WRITERS,
    OddPicture,
    decoded,
    exif,
    folder,
    pictures,
    plain,
    raw_samples,
    saved,
    section,
)


@pytest.fixture(scope="module")
def odd() -> dict[str, OddPicture]:
    return pictures()


def assert_shows(image: Any, odd: OddPicture, name: str) -> None:
    assert image.mode == "RGB", name
    assert image.size == odd.size, name
    for place, color in odd.pixels.items():
        difference = np.abs(np.subtract(image.getpixel(place), color)).max()
        assert difference <= odd.tolerance, f"{name} at {place}: {image.getpixel(place)}, not {color}"


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_odd_pictures_have_their_right_pixels_or_a_named_error(
    tmp_path: Path, odd: dict[str, OddPicture], source: str
) -> None:
    files = {}
    for name, picture in odd.items():
        files |= {f"{name}.{picture.suffix}": picture.content, f"{name}.txt": name.encode()}
    path = WRITERS[source](tmp_path, files)
    samples = {sample.captions[0]: sample for sample in raw_samples(open_source(section(source, path)))}
    assert samples.keys() == odd.keys()
    for name, picture in odd.items():
        raw = samples[name]
        assert isinstance(raw, RawSample)
        sample = decoded(raw)
        if picture.size is None:
            assert isinstance(sample, BadSample), name
            assert picture.error in str(sample), f"{name}: {sample}"
            assert name in str(sample)
            assert "BytesIO" not in str(sample)
        else:
            assert isinstance(sample, Sample), f"{name}: {sample}"
            assert_shows(sample.image, picture, name)
        if picture.size is None and not picture.readable_header:
            with pytest.raises(BadSample):
                picture_size(raw)
        elif picture.size is not None:
            assert picture_size(raw) == picture.size, name


@pytest.mark.parametrize("source", SOURCES)
def test_odd_pictures_are_read_alike_as_companions(tmp_path: Path, odd: dict[str, OddPicture], source: str) -> None:
    files = {}
    for name, picture in odd.items():
        width, height = picture.size or (WIDTH, HEIGHT)
        beside = saved(Image.new("RGB", (width, height)), "PNG")
        files |= {f"{name}.png": beside, f"{name}.hint.{picture.suffix}": picture.content, f"{name}.txt": name.encode()}
    path = WRITERS[source](tmp_path, files)
    samples = raw_samples(open_source(section(source, path), ("hint",)))
    assert len(samples) == len(odd)
    for raw in samples:
        assert isinstance(raw, RawSample)
        name = raw.captions[0]
        sample = decoded(raw)
        if odd[name].size is None:
            assert isinstance(sample, BadSample), name
            assert f"the hint of {raw.name}" in str(sample)
            assert odd[name].error in str(sample), name
        else:
            assert isinstance(sample, Sample), f"{name}: {sample}"
            assert_shows(sample.companions["hint"], odd[name], name)
            assert picture_size(raw) == sample.image.size


def test_header_of_a_companion_tells_that_its_size_is_wrong(tmp_path: Path) -> None:
    sideways = saved(Image.new("RGB", (HEIGHT, WIDTH)), "PNG", exif=exif(6))
    files = {"1.png": saved(plain, "PNG"), "1.txt": b"", "1.mask.png": sideways}
    (raw,) = raw_samples(open_source(section("folder", folder(tmp_path, files)), ("mask",)))
    assert isinstance(raw, RawSample)
    assert picture_size(raw) == (WIDTH, HEIGHT)
    (tmp_path / "1.mask.png").write_bytes(saved(Image.new("RGB", (HEIGHT, WIDTH)), "PNG"))
    (raw,) = raw_samples(open_source(section("folder", tmp_path), ("mask",)))
    assert isinstance(raw, RawSample)
    with pytest.raises(BadSample, match="has 16 x 24 pixels, and the picture has 24 x 16"):
        picture_size(raw)


def test_size_of_a_png_file_comes_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("the pixels are decoded"))
    assert picture_size(RawSample("1.png", PNG, ("",))) == (WIDTH, HEIGHT)


def test_formats_are_tried_in_one_order() -> None:
    order = format_order()
    assert set(order) == set(picture_formats().values())
    without_signature = [name for name in order if Image.OPEN[name][1] is None]
    assert "TGA" in without_signature
    assert list(order[-len(without_signature) :]) == without_signature == sorted(without_signature)
    assert not {"EPS", "PDF", "WMF", "HDF5"} & set(order)
    assert {"PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"} <= set(order)


# -- captions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CAPTIONS)
def test_odd_captions_are_read_or_named(tmp_path: Path, name: str, source: str) -> None:
    odd = CAPTIONS[name]
    files = {"1.png": PNG, **{f"1.{ending}": content for ending, content in odd.files.items()}}
    path = WRITERS[source](tmp_path, files)
    (sample,) = raw_samples(open_source(section(source, path, caption_field=odd.field)))
    if odd.captions is None:
        assert isinstance(sample, BadSample)
        assert odd.error in str(sample)
        assert "1" in str(sample)
    else:
        assert isinstance(sample, RawSample)
        assert sample.captions == odd.captions


@pytest.mark.parametrize("name", TABLES)
def test_tables_caption_the_pictures_of_a_folder(tmp_path: Path, name: str) -> None:
    files = {"1.png": PNG, "deep/2.png": PNG, "deep/3.png": PNG, "deep/3.txt": b"a cat", name: TABLES[name]}
    samples = list(read_samples(section("folder", folder(tmp_path, files))))
    assert [sample.captions for sample in samples] == [("a fox", "fox"), ("a dog",), ("a cat",)]
    assert open_source(section("folder", tmp_path)).left_out == LeftOut()
    (tmp_path / "4.png").write_bytes(PNG)
    with pytest.raises(UserError, match=rf"4\.png has no caption; {name} does not name it"):
        list(read_samples(section("folder", tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("metadata.jsonl", b'{"file_name": "1.png", "text": "a fox"}\n{', r"metadata\.jsonl is not JSON .*line 2"),
        ("metadata.jsonl", b'{"text": "a fox"}', r"has no 'file_name' in line 1"),
        (
            "metadata.jsonl",
            b'{"file_name": "1.png", "label": "x"}',
            "there are file_name, label: set data.caption_field",
        ),
        ("metadata.csv", b"file_name,text\n1.png\n", r"has no caption for 1\.png \(line 2\)"),
        ("metadata.csv", b'file_name,text\n1.png,"a', r"not a readable \.csv"),
        (
            "metadata.csv",
            b"file_name,text\n1.png,a fox, in snow",
            "more cells than columns in line 2; put captions with",
        ),
        ("metadata.csv", b"\xff\xfe\0", "not UTF-8"),
        ("captions.json", b"3", "neither an object"),
        ("captions.json", b'{"1.png": 3}', r"holds 3; expected a text or a list of texts \(entry '1\.png'\)"),
    ],
)
def test_a_wrong_table_is_named_with_its_row(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    folder(tmp_path, {"1.png": PNG, name: content})
    with pytest.raises(UserError, match=error) as caught:
        open_source(section("folder", tmp_path))
    assert str(tmp_path / name) in str(caught.value)


def test_parquet_tables_are_read_or_say_what_they_need(tmp_path: Path) -> None:
    folder(tmp_path, {"1.png": PNG, "metadata.parquet": b"PAR1"})
    installed = find_spec("pyarrow") is not None
    with pytest.raises(UserError, match="not a readable .parquet" if installed else "pip install pyarrow"):
        open_source(section("folder", tmp_path))
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"file_name": ["1.png"], "text": [["a fox", "fox"]]})
    pyarrow.parquet.write_table(table, tmp_path / "metadata.parquet")
    (sample,) = read_samples(section("folder", tmp_path))
    assert sample.captions == ("a fox", "fox")


@pytest.mark.parametrize("source", SOURCES)
def test_prefix_stands_before_every_caption(tmp_path: Path, source: str) -> None:
    files = {"1.png": PNG, "1.json": b'["a fox", ""]'}
    (sample,) = read_samples(section(source, WRITERS[source](tmp_path, files), caption_prefix="emoji, "))
    assert sample.captions == ("emoji, a fox", "emoji,")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_every_picture_with_a_caption_of_its_name_is_a_sample(tmp_path: Path, source: str) -> None:
    files = {}
    for name in NAMES:
        files |= {name: PNG, f"{name[:-4]}.txt": name.encode(), f"{name[:-4]}.mask.png": PNG}
    files |= dict.fromkeys(NO_SAMPLES, PNG)
    samples = list(read_samples(section(source, WRITERS[source](tmp_path, files)), ("mask",)))
    names = [sample.caption for sample in samples]
    assert sorted(names) == sorted(NAMES)
    assert all(set(sample.companions) == {"mask"} for sample in samples)
    if source == "folder":
        assert names == sorted(NAMES)
        assert [Path(sample.name).relative_to(tmp_path / "folder").as_posix() for sample in samples] == names


def test_a_folder_lists_links_and_passes_over_what_is_no_file(tmp_path: Path) -> None:
    files = {"inner/1.png": PNG, "inner/1.txt": b"a fox", "x.png/2.png": PNG, "x.png/2.txt": b"a dog"}
    folder(tmp_path, files)
    (tmp_path / "inner/loop").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "inner")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "gone.txt").write_text("gone")
    os.mkfifo(tmp_path / "pipe.png")
    samples = raw_samples(open_source(section("folder", tmp_path)))
    assert [type(sample) for sample in samples] == [BadSample, RawSample, RawSample, RawSample]
    assert "gone.png can't be read (No such file" in str(samples[0])
    assert [sample.captions[0] for sample in samples if isinstance(sample, RawSample)] == ["a fox", "a fox", "a dog"]


def test_files_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = {"a.svg": b"", "b.SVG": b"", "c.zzz": b"", "README": b"", "notes.txt": b""}
    folder(tmp_path, {"1.png": PNG, "1.txt": b"", **others})
    left_out = open_source(section("folder", tmp_path)).left_out
    assert left_out.suffixes == {".svg": 2, ".zzz": 1, "files without a suffix": 1}
    assert (left_out.captions, left_out.example) == (1, "notes.txt")
    check_source(section("folder", tmp_path))
    assert "4 files are not read (2 .svg, 1 .zzz, 1 files without a suffix)" in caplog.text
    assert "pip install pillow-heif" in not_read(Counter({".heic": 3}))


@given(st.lists(st.text(st.sampled_from("ab.-_/\U0001f98a"), min_size=1, max_size=8), max_size=12, unique=True))
@settings(max_examples=60, deadline=None)
def test_folder_order_is_that_of_the_paths(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root)
        for name in names:
            file = path / f"p{name.strip('/').replace('//', '')}.png"
            if not any(part.startswith(".") for part in file.relative_to(path).parts):
                file.parent.mkdir(parents=True, exist_ok=True)
                if not file.exists():
                    file.write_bytes(PNG)
                    file.with_name(file.name[:-4] + ".txt").write_text("")
        expected = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.png") if file.is_file())
        if expected:
            samples = raw_samples(open_source(section("folder", path)))
            assert [Path(sample.name).relative_to(path).as_posix() for sample in samples] == expected


def test_units_of_a_folder_are_read_alone(tmp_path: Path) -> None:
    for index in range(UNIT + 3):
        (tmp_path / f"{index:04d}.png").write_bytes(PNG)
        (tmp_path / f"{index:04d}.txt").write_text(str(index))
    source = open_source(section("folder", tmp_path))
    assert len(source) == 2
    last = [sample.captions[0] for sample in source.read(1) if isinstance(sample, RawSample)]
    assert last == [str(index) for index in range(UNIT, UNIT + 3)]
    before = [source.stamp(unit) for unit in range(2)]
    (tmp_path / "0514.txt").write_text("another caption")
    after = [source.stamp(unit) for unit in range(2)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_folder_of_many_files_is_kept_in_little_memory(tmp_path: Path) -> None:
    names = [f"{index:06d}" for index in range(5_000)]
    for name in names:
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.txt").touch()
    open_source(section("folder", tmp_path))  # everything that is loaded once
    tracemalloc.start()
    source = open_source(section("folder", tmp_path))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(names) < 50
    assert len(source) == -(-len(names) // UNIT)


# -- samples that can't be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "limit", "total", "words"),
    [
        (True, 0.01, 300, None),
        (True, 3, 3, None),
        (True, 0.01, 299, ["3 of 299 samples of the set are left out", "1.00% of 299", "data.skip_limit"]),
        (True, 2, 300, ["allows (2)"]),
        (False, 1, 300, ["3 of 300 samples of the set can't be used", "  0.png", "data check", "data.on_error: skip"]),
    ],
)
def test_problems_are_refused_above_their_limit(skip: bool, limit: float, total: int, words: list[str] | None) -> None:
    problems = Problems("the set", skip, limit)
    problems.check(0)
    for index in range(3):
        problems.add(f"{index}.png is broken")
    if words is None:
        problems.check(total)
        assert "3 of" in problems.summary(total)
        return
    with pytest.raises(UserError) as caught:
        problems.check(total)
    for word in words:
        assert word in str(caught.value)


def test_problems_name_the_first_twenty() -> None:
    problems = Problems("the set", True, 1000)
    for index in range(30):
        problems.add(f"{index}.png is broken")
    text = problems.summary(1000)
    assert "19.png" in text
    assert "20.png" not in text
    assert text.endswith("... and 10 more")


def test_samples_are_left_out_up_to_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, {"0.png": b"", "0.txt": b"", "1.png": PNG, "1.txt": b"a fox", "2.png": PNG})
    with pytest.raises(BadSample, match=r"0\.png is not a readable image .*0 bytes"):
        list(read_samples(section("folder", tmp_path)))
    data = section("folder", tmp_path, on_error="skip", skip_limit=2)
    assert [sample.caption for sample in read_samples(data)] == ["a fox"]
    assert "2 of 3 samples" in caplog.text
    check_source(data)
    with pytest.raises(UserError, match=r"0\.png[^\0]*2\.png has no caption[^\0]*more than data\.skip_limit"):
        list(read_samples(data.model_copy(update={"skip_limit": 0.5})))


@pytest.mark.parametrize("source", SOURCES)
def test_stamp_tells_the_companions_that_a_unit_must_have(tmp_path: Path, source: str) -> None:
    files = {f"{index:04d}.{ending}": PNG for index in range(UNIT + 1) for ending in ("png", "mask.png")}
    files |= {f"{index:04d}.txt": b"" for index in range(UNIT + 1)}
    path = WRITERS[source](tmp_path, files)
    with_mask = open_source(section(source, path), ("mask",))
    if source == "folder":
        before = with_mask.stamp(1)
        (path / "0000.mask.png").unlink()
        after = open_source(section(source, path), ("mask",)).stamp(1)
        assert before != after
        (last,) = open_source(section(source, path), ("mask",)).read(1)
        assert isinstance(last, BadSample)
        assert "0000.png has no mask picture beside it, and" in str(last)
    assert with_mask.stamp(0) != open_source(section(source, path)).stamp(0)
