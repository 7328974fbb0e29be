"""Read a folder of pictures, with its sub-folders: the names are kept packed, files are opened when they are read."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path

from ...config import DataSection
from ...errors import UserError
from .captions import TABLES, BadCaption, CaptionTable, captions_beside, table_rows
from .names import CAPTION, CAPTION_SUFFIXES, OTHER, PICTURE, is_hidden, kind_of, not_read, split_name, suffix_of
from .samples import COMPANIONS, BadSample, LeftOut, RawSample, uniform

UNIT = 512  # files
SEPARATOR = "\0"  # of the files of one sample; no file's name holds it


class Folder:
    """The pictures below a folder, in the order of their relative paths.

    Args:
        companions: names of ``COMPANIONS`` to read.
        strict: a sample with other companions than the first sample can't be used.

    Raises:
        UserError: there is no folder, or there are no pictures in it.
    """

    def __init__(self, data: DataSection, path: Path, companions: Sequence[str] = (), strict: bool = True) -> None:
        if not path.is_dir():
            raise UserError(
                f"data.path: there is no folder {path}; give a folder of images with a .txt caption beside each"
            )
        self.path = path
        self.companions = tuple(companions)
        self.strict = strict
        self.left_out = LeftOut()
        self._field, self._prefix = data.caption_field, data.caption_prefix
        # Each sample is one entry: "0001.png\0txt\0mask.png", the picture and the endings of the files beside it.
        self._entries = bytearray()
        self._ends = array("Q")
        self._folders: list[tuple[int, str]] = []  # number of the first entry, folder
        self._lost: list[str] = []  # companions without a picture
        self._table = CaptionTable()
        self._tables: list[Path] = []
        self._scan("", ())
        for table in sorted(self._tables):
            self._add_table(table)
        if not self._ends:
            raise UserError(self._nothing())

    @property
    def title(self) -> str:
        """The folder's path."""
        return str(self.path)

    def __len__(self) -> int:
        return -(-len(self._ends) // UNIT)

    def stamp(self, unit: int) -> str:
        """Return a hash of names, sizes and times of the unit's files, and of the tables of captions."""
        digest = blake2b(f"{self.path.resolve()}\0{self._expected}".encode("utf-8", "surrogatepass"), digest_size=16)
        files = (self._file(stem, ending) for *_, stem, endings in self._unit(unit) for ending in endings)
        for file in (*files, *self._tables):
            try:
                status = os.stat(file)
                text = f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0"
            except OSError:
                text = f"{file}\0gone\0"
            digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def read(self, unit: int) -> Iterator[RawSample | BadSample]:
        """Yield the samples of a unit; the last unit ends with the companions that have no picture."""
        samples = (self._sample(stem, endings) for stem, endings in self._unit(unit))
        yield from uniform(samples, self.companions, lambda: self._first) if self.strict else samples
        if unit == len(self) - 1:
            for lost in self._lost:
                path = self.path / lost
                yield BadSample(
                    str(path),
                    f"{path} has the name of a companion ({', '.join(COMPANIONS)}), but there is no picture "
                    f"{split_name(path.name)[0]}.*; rename it, or put it beside its picture",
                    "companion",
                )

    @cached_property
    def _first(self) -> tuple[str, frozenset[str]]:
        """Name and companions of the first sample: all others must have the same companions."""
        stem, endings = next(self._unit(0))
        return str(self._file(stem, endings[0])), frozenset(self._companions(stem, endings))

    @property
    def _expected(self) -> list[str]:
        """The companions that every sample must have."""
        return sorted(self._first[1]) if self.companions else []

    def _sample(self, stem: str, endings: list[str]) -> RawSample | BadSample:
        path = self._file(stem, endings[0])
        try:
            captions = self._captions(stem, endings, path)
            if captions is None:
                return BadSample(str(path), self._no_caption(path, endings), "caption")
            return RawSample(
                str(path),
                path.read_bytes(),
                tuple(f"{self._prefix}{text}".strip() for text in captions),
                {name: file.read_bytes() for name, file in self._companions(stem, endings).items()},
            )
        except OSError as error:
            return BadSample(str(path), f"{error.filename or path} can't be read ({error.strerror or error})")
        except BadCaption as error:
            return BadSample(str(path), f"the caption of {path} {error}", "caption")

    def _companions(self, stem: str, endings: list[str]) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for ending in endings[1:]:
            name = ending.partition(".")[0]
            if name in self.companions and "." in ending:
                found.setdefault(name, self._file(stem, ending))
        return {name: found[name] for name in self.companions if name in found}

    def _captions(self, stem: str, endings: list[str], path: Path) -> tuple[str, ...] | None:
        files = {
            ending.lower(): partial(Path.read_bytes, self._file(stem, ending))
            for ending in endings[1:]
            if ending.lower() in CAPTION_SUFFIXES
        }
        found = captions_beside(files, self._field)
        if found is None and len(self._table):
            relative = path.relative_to(self.path).as_posix()
            found = self._table.find(relative, stem)
        return found

    def _no_caption(self, path: Path, endings: list[str]) -> str:
        wanted = f"write one into {path.with_suffix('.txt').name} beside it (an empty file is fine)"
        if any(ending.lower() == "json" for ending in endings[1:]):
            wanted = f"its .json has no field of captions; set data.caption_field, or {wanted}"
        elif self._tables:
            wanted = f"{', '.join(table.name for table in self._tables)} does not name it; add it there, or {wanted}"
        return f"{path} has no caption; {wanted}"

    # -- the list of files ---------------------------------------------------------------------------------------------

    def _file(self, stem: str, ending: str) -> Path:
        return self.path / f"{stem}.{ending}"

    def _unit(self, unit: int) -> Iterator[tuple[str, list[str]]]:
        """Yield stem (relative path without ending) and endings of each sample; the picture's ending is the first."""
        for number in range(unit * UNIT, min((unit + 1) * UNIT, len(self._ends))):
            begin = self._ends[number - 1] if number else 0
            picture, *others = os.fsdecode(bytes(self._entries[begin : self._ends[number]])).split(SEPARATOR)
            stem, _, ending = picture.rpartition(".")
            place = bisect_right(self._folders, number, key=lambda entry: entry[0]) - 1
            yield f"{self._folders[place][1]}{stem}", [ending, *others]

    def _scan(self, folder: str, parents: tuple[tuple[int, int], ...]) -> None:
        """Add the pictures of a folder and of its sub-folders, in the order of their paths.

        Args:
            folder: relative, with a slash at its end; "" for the folder itself.
            parents: device and inode of the folders around it: a link to one of them is not followed.
        """
        path = self.path / folder
        files, folders = self._listed(path)
        status = path.stat()
        here = (status.st_dev, status.st_ino)
        if here in parents:
            return
        items = [*map(os.fsencode, self._grouped(files, folder)), *(os.fsencode(f"{name}/") for name in folders)]
        items.sort()
        opened = False
        for item in items:
            if item.endswith(b"/"):
                self._scan(folder + os.fsdecode(item), (*parents, here))
                opened = False
            else:
                if not opened:
                    self._folders.append((len(self._ends), folder))
                    opened = True
                self._entries += item
                self._ends.append(len(self._entries))

    def _listed(self, path: Path) -> tuple[list[bytes], list[str]]:
        """Return the files of a folder, as stem, separator and ending, and its sub-folders.

        Bytes take less memory than texts: of a million pictures 50 MB less.
        """
        files, folders = [], []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.name in TABLES and not entry.name.endswith(".json"):
                        self._tables.append(path / entry.name)
                    elif (kind := split_name(entry.name))[1] == OTHER or not (entry.is_file() or entry.is_symlink()):
                        self.left_out.suffixes[suffix_of(entry.name)] += 1
                    else:
                        files.append(os.fsencode(f"{kind[0]}{SEPARATOR}{entry.name[len(kind[0]) + 1 :]}"))
        except OSError as error:
            raise UserError(f"the folder {path} can't be read ({error.strerror or error})") from error
        files.sort()
        return files, folders

    def _grouped(self, files: list[bytes], folder: str) -> Iterator[str]:
        """Yield the entry of each picture. The list of files is empty afterwards."""
        while files:  # from the end, so that the memory of names is free for entries
            stem, _, ending = os.fsdecode(files.pop()).partition(SEPARATOR)
            endings = [ending]
            while files and files[-1].startswith(os.fsencode(f"{stem}{SEPARATOR}")):
                endings.append(os.fsdecode(files.pop()).partition(SEPARATOR)[2])
            endings.reverse()
            pictures = [ending for ending in endings if kind_of(ending) == PICTURE]
            others = [ending for ending in endings if kind_of(ending) != PICTURE]
            for picture in pictures:
                yield SEPARATOR.join((f"{stem}.{picture}", *others))
            if pictures:
                continue
            for ending in endings:
                if f"{stem}.{ending}" in TABLES:
                    self._tables.append(self.path / folder / f"{stem}.{ending}")
                elif kind_of(ending) == CAPTION:
                    self.left_out.captions += 1
                    self.left_out.example = f"{folder}{stem}.{ending}"
                else:
                    self._lost.append(f"{folder}{stem}.{ending}")

    def _add_table(self, path: Path) -> None:
        folder = path.parent.relative_to(self.path)
        for name, captions in table_rows(path, self._field):
            self._table.add(os.path.normpath(folder / name).replace(os.sep, "/"), captions)

    def _nothing(self) -> str:
        shards = sum(count for suffix, count in self.left_out.suffixes.items() if suffix in (".tar", ".gz", ".tgz"))
        if shards:
            return f"data.path: no images in {self.path}, but {shards} .tar files; set data.source to webdataset"
        found = "; ".join((*([not_read(self.left_out.suffixes)] if self.left_out.suffixes else []), *self._lost[:1]))
        return (
            f"data.path: no images in {self.path}; expected png, jpg, webp or other images, with a .txt caption beside "
            "each" + (f" ({found})" if found else "")
        )
