"""Odd pictures, captions, names and shards: folder and shard give the right value of each, or name what is wrong."""

from __future__ import annotations

import gzip
import io
import os
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flash_diffusion.trainer.config import DataSection
from flash_diffusion.trainer.data.reading import check_source, decode, open_source, picture_size, read_samples
from flash_diffusion.trainer.data.reading.folder import UNIT
from flash_diffusion.trainer.data.reading.names import not_read
from flash_diffusion.trainer.data.reading.samples import BadSample, RawSample, Sample, Source
from flash_diffusion.trainer.data.reading.shards import samples_of, stream_groups
from flash_diffusion.trainer.errors import UserError

from .odd_data import (
    CAPTIONS,
    HEIGHT,
    NAMES,
    NO_SAMPLES,
    WIDTH,
    WRITERS,
    OddPicture,
    exif,
    folder,
    pictures,
    plain,
    saved,
    shard,
)

SOURCES = ("folder", "webdataset")
PNG = saved(plain, "PNG")


@pytest.fixture(scope="module")
def odd() -> dict[str, OddPicture]:
    return pictures()


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


TABLES = {
    "metadata.jsonl": b'{"file_name": "1.png", "text": "a fox"}\n\n{"file_name": "deep/2.png", "text": "a dog"}\n'
    b'{"file_name": "1.png", "text": "fox"}\n',
    "metadata.csv": b'\xef\xbb\xbffile_name,width,text\n1.png,8,a fox\n"deep/2.png",8,"a dog"\n1.png,8,fox\n',
    "captions.json": b'{"1.png": ["a fox", "fox"], "deep/2": {"caption": "a dog"}}',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_caption_the_pictures_of_a_folder(tmp_path: Path, name: str) -> None:
    files = {"1.png": PNG, "deep/2.png": PNG, "deep/3.png": PNG, "deep/3.txt": b"a cat", name: TABLES[name]}
    samples = list(read_samples(section("folder", folder(tmp_path, files))))
    assert [sample.captions for sample in samples] == [("a fox", "fox"), ("a dog",), ("a cat",)]
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


# -- shards ------------------------------------------------------------------------------------------------------------


def pairs(*names: str) -> dict[str, bytes]:
    """Members of a shard: pictures and captions."""
    return {file: content for name in names for file, content in ((f"{name}.png", PNG), (f"{name}.txt", name.encode()))}


def webdataset_captions(path: Path) -> list[str]:
    """The captions of a shard's samples, as WebDataset reads them."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as stream:
        records = group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
        return [record["txt"].decode() for record in records if "png" in record]


@pytest.mark.parametrize(
    "members",
    [
        pairs("0001", "0002"),
        pairs("a/0001", "b/0001", "./c/0003"),
        {**pairs("0001"), "0001.mask.png": PNG, "0001.thumb.png": PNG, "0001.cls": b"3", **pairs("0002")},
    ],
)
def test_ordinary_shards_are_read_as_webdataset_reads_them(tmp_path: Path, members: dict[str, bytes]) -> None:
    path = shard(tmp_path / "a.tar", members)
    captions = [sample.caption for sample in read_samples(section("webdataset", path))]
    assert captions == webdataset_captions(path) != []


def test_picture_with_a_dotted_ending_has_the_caption_of_its_key(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar", {"0001.image.png": PNG, "0001.txt": b"a fox", "0002.image.png": PNG, "0002.txt": b""}
    )
    assert [sample.caption for sample in read_samples(section("webdataset", path))] == ["a fox", ""]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_of_a_shard_may_have_any_order(tmp_path: Path, mode: str) -> None:
    members = pairs("0001", "v1.5_fox", "0003", "v1.6_fox")
    mixed = dict(sorted(members.items(), key=lambda member: member[0][::-1]))
    path = shard(tmp_path / "a.tar", mixed, mode)
    captions = {sample.caption for sample in read_samples(section("webdataset", path))}
    assert captions == {"0001", "v1.5_fox", "0003", "v1.6_fox"}
    with path.open("rb") as stream, pytest.raises(UserError, match="not next to each other .* `tar --sort=name`"):
        list(stream_groups(stream, "a.tar"))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"])
def test_compressed_shards_in_sub_folders_are_read(tmp_path: Path, suffix: str) -> None:
    mode = {".tgz": "w:gz"}.get(suffix, f"w:{suffix.split('.')[2]}" if suffix.count(".") == 2 else "w")
    (tmp_path / "part").mkdir()
    shard(tmp_path / f"part/b{suffix}", pairs("3"), mode)
    shard(tmp_path / f"a{suffix}", pairs("1", "2"), mode)
    (tmp_path / f"._a{suffix}").write_bytes(b"x")
    source = open_source(section("webdataset", tmp_path))
    assert len(source) == 2
    assert [sample.captions[0] for sample in raw_samples(source) if isinstance(sample, RawSample)] == ["1", "2", "3"]


def test_streams_without_seek_give_the_same_groups(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        def __init__(self, content: bytes) -> None:
            self._content = io.BytesIO(content)

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            return self._content.read(min(size, 1000) if size >= 0 else -1)

    members = {**pairs("0001", "v1.5_fox", "v1.6_fox"), "v1.6_fox.mask.png": PNG}
    for mode in ("w", "w:gz"):
        content = shard(tmp_path / "a.tar", members, mode).read_bytes()
        groups = list(stream_groups(Pipe(content), "https://example.org/a.tar"))  # type: ignore[arg-type]
        assert [(key, len(group)) for key, group in groups] == [("0001", 2), ("v1", 5)]
        samples = [sample for key, group in groups for sample in samples_of(key, group, "a.tar", ("mask",))]
        assert [sample.name for sample in samples] == ["0001 in a.tar", "v1.5_fox in a.tar", "v1.6_fox in a.tar"]
        with pytest.raises(UserError, match=r"https://example\.org/a\.tar can't be read"):
            list(stream_groups(Pipe(content[: len(content) // 2 + 60]), "https://example.org/a.tar"))  # type: ignore[arg-type]


def damaged(content: bytes) -> dict[str, bytes]:
    """A shard's bytes, damaged in several ways."""
    second = content.index(b"0002.png")
    return {
        "no bytes": b"",
        "no tar": b"not a tar file" * 100,
        "cut in a member": content[: second + 600],
        "cut in a header": content[: second + 100],
        "damaged header": content[: second + 120] + b"XXXX" + content[second + 124 :],
        "zstd": b"\x28\xb5\x2f\xfd" + content,
    }


@pytest.mark.parametrize("case", damaged(b"0002.png"))
def test_damaged_shards_are_named(tmp_path: Path, case: str) -> None:
    path = shard(tmp_path / "a.tar", pairs("0001", "0002", "0003"))
    path.write_bytes(damaged(path.read_bytes())[case])
    with pytest.raises(UserError, match=r"the shard .*a\.tar (can't be read|is compressed with zstd)"):
        list(read_samples(section("webdataset", path)))
    path.write_bytes(gzip.compress(path.read_bytes()))
    if case != "no bytes":
        with pytest.raises(UserError, match=r"the shard .*a\.tar"):
            list(read_samples(section("webdataset", path)))


# -- prompts -----------------------------------------------------------------------------------------------------------

PROMPTS = {
    "a.txt": (b"a fox\r\n\n  a dog \na fox\n", ["a fox", "a dog", "a fox"], 1),
    "b.txt": ("\ufeffa fox\n狐".encode("utf-16"), ["a fox", "狐"], 0),
    "c.txt": ("\ufeffa fox\n狐".encode(), ["a fox", "狐"], 0),
    "a.json": (b'["a fox", "", "a dog"]', ["a fox", "a dog"], 1),
    "b.json": (b'{"1.png": "a fox", "2.png": ["a dog", "dog"]}', ["a fox", "a dog", "dog"], 0),
    "c.json": (b'{"annotations": [{"caption": "a fox", "image_id": 1}]}', ["a fox"], 0),
    "a.jsonl": (b'{"text": "a fox"}\n"a dog"\n', ["a fox", "a dog"], 0),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_read_in_order(tmp_path: Path, name: str) -> None:
    content, expected, empty = PROMPTS[name]
    (tmp_path / name).write_bytes(content)
    source = open_source(section("prompts", tmp_path / name, caption_prefix="emoji, "))
    samples = [sample for sample in raw_samples(source) if isinstance(sample, RawSample)]
    assert [sample.captions for sample in samples] == [(f"emoji, {text}",) for text in expected]
    assert all(sample.picture is None and name in sample.name for sample in samples)
    assert source.left_out.empty == empty


def test_a_folder_of_texts_gives_one_prompt_a_file(tmp_path: Path) -> None:
    folder(
        tmp_path, {"b.txt": b"a dog\nin snow", "a.txt": b"a fox", "deep/c.txt": b"\n", "._a.txt": b"x", "a.png": PNG}
    )
    source = open_source(section("prompts", tmp_path))
    samples = [sample for sample in raw_samples(source) if isinstance(sample, RawSample)]
    assert [(Path(sample.name).name, sample.captions) for sample in samples] == [
        ("a.txt", ("a fox",)),
        ("b.txt", ("a dog\nin snow",)),
    ]


def test_many_prompts_are_read_in_units(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"prompt {index}" for index in range(1100)))
    source = open_source(section("prompts", tmp_path / "a.txt"))
    assert len(source) == 3
    last = [sample for sample in source.read(2) if isinstance(sample, RawSample)]
    assert [sample.captions[0] for sample in last] == [f"prompt {index}" for index in range(1024, 1100)]
    assert last[0].name == "a.txt, entry 1025"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.txt", b"\n \n", "no prompts in .*a.txt"),
        ("a.txt", b"a fox\n\xff\n", r"is not UTF-8 text .*\(line 2\)"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"3", "neither a list nor an object"),
        ("a.json", b'[{"width": 3}]', "has no text in entry 1"),
        ("a.jsonl", b'"a"\n{', r"is not JSON .*\(line 2\)"),
        ("missing/a.txt", None, "there is no file"),
    ],
)
def test_wrong_prompts_are_explained(tmp_path: Path, name: str, content: bytes | None, error: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=error):
        open_source(section("prompts", tmp_path / name))


# -- any bytes ---------------------------------------------------------------------------------------------------------

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
