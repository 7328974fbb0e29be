"""Read WebDataset shards: tar files in which the members of one sample share a name. Nothing is written to disk.

WebDataset's key is a name up to the first dot. Names such as ``v1.5_fox.png`` have dots of their own, so the members of
one key are divided again, by their names before a known ending.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import IO

from ...config import DataSection
from ...errors import UserError
from ..remote.opening import RemoteFile, stamp_of
from ..remote.patterns import expand, file_name, shown, title
from .captions import BadCaption, captions_beside
from .names import CAPTION, CAPTION_SUFFIXES, OTHER, PICTURE, SHARD_SUFFIXES, is_hidden, kind_of, split_name, suffix_of
from .samples import COMPANIONS, BadSample, LeftOut, RawSample, uniform

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
REMOTE_BUFFER = 1 << 18  # bytes
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\0\0\x80", ZSTD_MAGIC)

Member = tuple[str, bytes]  # path in the shard, content


class StrictTarInfo(tarfile.TarInfo):
    """A member's header. tarfile takes a damaged header for the end of the file; here it is an error."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> StrictTarInfo:
        """Return the next header."""
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged at byte {tarfile_.offset}: {error}") from error


class Shards:
    """The samples of shards; a unit is a shard, on disk or remote.

    Args:
        path: shards, folders of shards, patterns and URLs, see ``data.path``.
        companions: names of ``COMPANIONS`` to read.
        strict: a sample with other companions than the first sample can't be used.

    Raises:
        UserError: there are no shards.
    """

    def __init__(
        self,
        data: DataSection,
        path: Path | str | Sequence[Path | str],
        companions: Sequence[str] = (),
        strict: bool = True,
    ) -> None:
        self.companions = tuple(companions)
        self.strict = strict
        self.paths = [shard for one in expand(path) for shard in _shard_paths(one)]
        if twice := [shard for shard, count in Counter(self.paths).items() if count > 1]:
            raise UserError(f"data.path: {shown(twice[0])} comes twice; name each shard once")
        self.left_out = LeftOut()
        self._field, self._prefix = data.caption_field, data.caption_prefix
        self._title = title(path)

    @property
    def title(self) -> str:
        """The path of the shard, or of the folder of shards; of a list the first one."""
        return self._title

    def __len__(self) -> int:
        return len(self.paths)

    def stamp(self, unit: int) -> str | None:
        """Return path, size, time of a shard, and the companions that every sample must have; None where its server
        tells too little.
        """
        path = self.paths[unit]
        expected = "\0".join(("", *sorted(self._first[1]))) if self.companions else ""
        if isinstance(path, str):
            stamp = stamp_of(path)
            return None if stamp is None else stamp + expected
        try:
            status = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        return f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}{expected}"

    def read(self, unit: int) -> Iterator[RawSample | BadSample]:
        """Yield the samples of a shard.

        Raises:
            UserError: the shard can't be read, or holds no pictures.
        """
        samples = self._samples(self.paths[unit])
        return uniform(samples, self.companions, lambda: self._first) if self.strict else samples

    @cached_property
    def _first(self) -> tuple[str, frozenset[str]]:
        """Name and companions of the first usable sample: all others must have the same companions."""
        for path in self.paths:
            for sample in self._samples(path):
                if isinstance(sample, RawSample):
                    return sample.name, frozenset(sample.companions)
        return "", frozenset()

    def _samples(self, path: Path | str) -> Iterator[RawSample | BadSample]:
        found = False
        for key, members in _shard_members(path) if isinstance(path, Path) else _remote_members(path):
            for sample in samples_of(
                key, members, file_name(path), self.companions, self._field, self._prefix, self.left_out.suffixes
            ):
                found = True
                yield sample
        if not found:
            raise UserError(
                f"the shard {shown(path)} holds no images; expected png, jpg, webp or other images with .txt captions"
            )


def samples_of(
    key: str,
    members: Sequence[Member],
    shard: str,
    companions: Sequence[str] = (),
    field: str | None = None,
    prefix: str = "",
    others: Counter[str] | None = None,
) -> Iterator[RawSample | BadSample]:
    """Yield the samples of the members that share a WebDataset key.

    Args:
        key: path of the members up to the first dot of their name.
        members: in the shard's order.
        shard: name of the shard, for messages.
        field, prefix: data.caption_field and data.caption_prefix.
        others: counts the suffixes of members that are not read.
    """
    groups: dict[str, dict[str, bytes]] = {}
    for name, content in members:
        folder, _, base = name.rpartition("/")
        stem, kind = split_name(base)
        if kind == OTHER:
            if others is not None:
                others[suffix_of(base)] += 1
            continue
        stem = f"{folder}/{stem}" if folder else stem
        group = groups.setdefault(stem, {})
        ending = name[len(stem) + 1 :]
        if ending in group:
            yield BadSample(
                f"{stem} in {shard}",
                f"{name} comes twice in {shard}; write the shard again with each file once",
                "caption" if kind == CAPTION else "picture",
            )
            return
        group[ending] = content
    captions = {stem: group for stem, group in groups.items() if any(kind_of(ending) == CAPTION for ending in group)}
    for stem, group in groups.items():
        # In WebDataset's naming 0001.image.png belongs to the caption 0001.txt. Beside 0001.png it is a further member,
        # and no sample.
        whole = groups.get(key) if key != stem else None
        name = f"{stem} in {shard}"
        pictures = [ending for ending in group if kind_of(ending) == PICTURE]
        if stem not in captions and whole is not None and key in captions and pictures:
            if any(kind_of(ending) == PICTURE for ending in whole):
                if others is not None:
                    others.update(f".{stem[len(key) + 1 :]}.{ending}".lower() for ending in pictures)
                continue
            group = {**whole, **group}
        if not pictures:
            lost = next((kind for ending in group if (kind := kind_of(ending)) in COMPANIONS), None)
            if lost is not None:
                yield BadSample(
                    name,
                    f"{name} has a {lost} picture, but no picture that the {lost} belongs to; add the picture",
                    "companion",
                )
            continue
        for ending in pictures:
            yield _sample(name, group, ending, companions, field, prefix)


def _sample(
    name: str, group: dict[str, bytes], picture: str, companions: Sequence[str], field: str | None, prefix: str
) -> RawSample | BadSample:
    texts = {ending.lower(): partial(group.__getitem__, ending) for ending in group if kind_of(ending) == CAPTION}
    try:
        captions = captions_beside(texts, field)
    except BadCaption as error:
        return BadSample(name, f"the caption of {name} {error}", "caption")
    if captions is None:
        wanted = " or ".join(f".{suffix}" for suffix in CAPTION_SUFFIXES)
        hint = "; its .json has no field of captions: set data.caption_field" if "json" in texts else ""
        return BadSample(name, f"{name} has no caption; expected a {wanted} next to the image{hint}", "caption")
    beside = {kind: group[ending] for ending in reversed(group) if (kind := kind_of(ending)) in companions}
    return RawSample(
        name,
        group[picture],
        tuple(f"{prefix}{text}".strip() for text in captions),
        {companion: beside[companion] for companion in companions if companion in beside},
    )


def group_members(members: Iterable[Member], title: str) -> Iterator[tuple[str, list[Member]]]:
    """Yield WebDataset key and members of each key, from members in one pass.

    Raises:
        UserError: the members of a key are not adjacent.
    """
    seen: set[int] = set()
    for key, group in groupby(members, key=lambda member: webdataset_key(member[0])):
        if hash(key) in seen:
            raise UserError(
                f"the files of {key} are not next to each other in {title}; write it again with `tar --sort=name`"
            )
        seen.add(hash(key))
        yield key, list(group)


def read_members(stream: IO[bytes], contents: bool = True) -> Iterator[Member]:
    """Yield path and content of each file of a tar stream in one pass; it may be compressed, and need not seek.

    Args:
        contents: False: yield empty contents, for the names alone.

    Raises:
        tarfile.TarError, OSError, EOFError and others: the stream is damaged.
    """
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as tar:
        for info in tar:
            if _is_read(info):
                file = tar.extractfile(info)
                assert file is not None  # regular files only
                yield info.name, file.read() if contents else b""


def stream_groups(stream: IO[bytes], title: str) -> Iterator[tuple[str, list[Member]]]:
    """Yield WebDataset key and members of each key of an opened tar stream, local or remote, in one pass.

    Raises:
        UserError: the stream is damaged, or the members of a key are not adjacent.
    """
    try:
        yield from group_members(read_members(stream), title)
    except UserError:
        raise
    except Exception as error:  # on damaged bytes tarfile and the decompressors raise anything
        raise _unreadable(title, error) from error


def webdataset_key(name: str) -> str:
    """Return a member's path up to the first dot of its name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _shard_members(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """Yield key and members of a shard on disk. The members may have any order."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(6)
            stream.seek(0)
            if magic.startswith(ZSTD_MAGIC) and "zst" not in tarfile.TarFile.OPEN_METH:
                raise UserError(
                    f"the shard {path} is compressed with zstd, which needs Python 3.14; run `zstd -d` on it"
                )
            yield from (_counted_groups if magic.startswith(COMPRESSED) else _indexed_groups)(stream)
    except UserError:
        raise
    except Exception as error:  # on damaged bytes tarfile raises anything
        raise _unreadable(path, error) from error


def _remote_members(url: str) -> Iterator[tuple[str, list[Member]]]:
    """Yield key and members of a remote shard, in one pass."""
    with RemoteFile(url) as raw, BufferedReader(raw, REMOTE_BUFFER) as stream:
        yield from stream_groups(stream, shown(url))


def _counted_groups(stream: IO[bytes]) -> Iterator[tuple[str, list[Member]]]:
    """Yield key and members of a compressed shard, in two passes, in the order in which keys are complete."""
    missing = Counter(webdataset_key(name) for name, _ in read_members(stream, contents=False))
    stream.seek(0)
    waiting: dict[str, list[Member]] = {}
    for member in read_members(stream):
        key = webdataset_key(member[0])
        waiting.setdefault(key, []).append(member)
        missing[key] -= 1
        if missing[key] == 0:
            yield key, waiting.pop(key)


def _indexed_groups(stream: IO[bytes]) -> Iterator[tuple[str, list[Member]]]:
    """Yield key and members of a plain .tar file, in two passes: the members of a key need not be adjacent."""
    index: dict[str, list[tuple[str, int, int]]] = {}
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictTarInfo) as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header in memory
            if info.issparse():
                raise tarfile.ReadError(f"{info.name} is a sparse file; write the shard without --sparse")
            if _is_read(info):
                index.setdefault(webdataset_key(info.name), []).append((info.name, info.offset_data, info.size))
    for key, places in index.items():
        yield key, [(name, _content(stream, name, place, size)) for name, place, size in places]


def _content(stream: IO[bytes], name: str, place: int, size: int) -> bytes:
    stream.seek(place)
    content = stream.read(size)
    if len(content) < size:
        raise tarfile.ReadError(f"{name} has {len(content)} of {size} bytes")
    return content


def _is_read(info: tarfile.TarInfo) -> bool:
    return info.isreg() and not any(is_hidden(part) for part in info.name.split("/") if part not in (".", ".."))


def _unreadable(shard: Path | str, error: Exception) -> UserError:
    return UserError(
        f"the shard {shard} can't be read ({' '.join(str(error).split()) or type(error).__name__}); it may be "
        "truncated, or not a tar file"
    )


def _shard_paths(path: Path | str) -> Sequence[Path | str]:
    """Return a shard, or the shards of a folder."""
    if isinstance(path, str):
        if path.endswith("/"):
            raise UserError(
                f"data.path: {shown(path)} is a folder; name its shards with a pattern, such as "
                f"{shown(path)}shard-{{000..099}}.tar"
            )
        return [path]
    if path.is_file():
        return [path]
    shards = []
    if path.is_dir():
        for shard in path.rglob("*"):
            inside = shard.relative_to(path).parts
            if shard.name.endswith(SHARD_SUFFIXES) and shard.is_file() and not any(map(is_hidden, inside)):
                shards.append(shard)
    if not shards:
        raise UserError(
            f"data.path: no shards at {path}; expected {', '.join(SHARD_SUFFIXES)} files, or a folder of them"
        )
    return sorted(shards, key=lambda shard: shard.relative_to(path).as_posix())
