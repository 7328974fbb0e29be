"""Shards of any order, name, compression and damage, against WebDataset's own reader."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest

from flash_diffusion.trainer.data.reading import open_source, read_samples
from flash_diffusion.trainer.data.reading.samples import RawSample
from flash_diffusion.trainer.data.reading.shards import samples_of, stream_groups
from flash_diffusion.trainer.errors import UserError

from .odd_data import (
    PNG,
    raw_samples,
    section,
    shard,
)


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
