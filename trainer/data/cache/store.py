"""Keep rows of tensors on disk under keys, in safetensors files of many rows.

A file is written whole or not at all, and is never changed. Its name is a hash of its keys. So runs, processes and
machines may share a store without locks: two that write the same rows write the same file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import UserError
from ...files import remove_partials, write_whole

logger = logging.getLogger(__name__)

KEY_BYTES = 16
KEYS, CHECKSUMS = "keys", "checksums"  # tensors of every file, beside the rows
FACTS = "facts"  # metadata of every file
ABOUT = "about.json"
FORMAT = "flash-cache-2"

Keys = NDArray[np.uint8]  # (n, 16)


def key_of(*parts: bytes | str | int) -> bytes:
    """Return a hash of parts, 16 bytes. Parts of different kinds or lengths never give the same key by chance."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{type(part).__name__}{len(content)}:".encode() + content)
    return digest.digest()


def as_keys(keys: Iterable[bytes]) -> Keys:
    """Return keys as an array (n, 16). No list of the keys is made, so that a million of them take 16 MB."""
    content = bytearray()
    for key in keys:
        content += key
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, KEY_BYTES)


def sortable(keys: Keys) -> NDArray[Any]:
    """Return keys (n, 16) as n values that numpy compares and sorts."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").reshape(-1)


@dataclass(frozen=True)
class Places:
    """Where rows are.

    Attributes:
        file: (n,) number of the file in ``files``; -1 for a row that is missing.
        row: (n,) row in the file.
        files: names of all files of the store.
    """

    file: NDArray[np.int32]
    row: NDArray[np.int32]
    files: tuple[str, ...]

    @property
    def missing(self) -> NDArray[np.bool_]:
        """(n,) True for a row that the store does not hold."""
        return self.file < 0

    def part(self, index: NDArray[Any]) -> Places:
        """Return the places at ``index``."""
        return Places(self.file[index], self.row[index], self.files)


@dataclass(frozen=True)
class Store:
    """The rows of one kind, made by one encoder: latents, text conditions, a task's conditions.

    Attributes:
        folder: of the store.
        about: what the store holds, for `flash-diffusion cache ls`.
        dtype: of floating-point rows on disk, unless their own is smaller; rows come back in their own.
    """

    folder: Path
    about: Mapping[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def write(self, keys: Sequence[bytes], rows: Mapping[str, Tensor]) -> Path:
        """Write n rows under n keys as one file, and return its path.

        Args:
            rows: name -> (n, ...).
        """
        self._describe()
        stored = {name: self._stored(value) for name, value in rows.items()}
        key_array = as_keys(keys)
        tensors = {
            **stored,
            KEYS: torch.from_numpy(key_array),
            CHECKSUMS: torch.tensor([_checksum(stored, row) for row in range(len(keys))]),
        }
        given = {name: str(value.dtype).removeprefix("torch.") for name, value in rows.items()}
        facts = {"format": FORMAT, "dtypes": given, "keys": zlib.crc32(key_array.tobytes())}
        metadata = {FACTS: json.dumps(facts, sort_keys=True)}  # one entry: safetensors writes several in any order
        path = self.path_of(key_array)
        write_whole(path, lambda partial: save_file(tensors, partial, metadata=metadata), shared=True)
        return path

    def path_of(self, keys: Keys) -> Path:
        """Return the file of the rows of ``keys`` (n, 16), where they were written as one file."""
        return self.folder / f"{hashlib.sha256(keys.tobytes()).hexdigest()[:24]}.safetensors"

    def find(self, keys: Keys) -> Places:
        """Return where the rows of ``keys`` (n, 16) are. Damaged files are removed, with a line in the log.

        The store may hold far more rows than are asked for: the keys of one file at a time are in memory.
        """
        files: list[str] = []
        place = Places(np.full(len(keys), -1, np.int32), np.zeros(len(keys), np.int32), ())
        order = np.argsort(sortable(keys), kind="stable")
        wanted = sortable(keys)[order]
        for path in sorted(self.folder.glob("*.safetensors")):
            content = self.read_keys(path)
            if content is None:
                continue
            first, end = (np.searchsorted(wanted, sortable(content), side) for side in ("left", "right"))
            hits = np.flatnonzero(end > first)
            counts = (end - first)[hits]  # a key may be wanted several times
            inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            at = order[np.repeat(first[hits], counts) + inside]
            new = place.file[at] < 0
            place.file[at[new]] = len(files)
            place.row[at[new]] = np.repeat(hits, counts)[new]
            files.append(path.name)
        return Places(place.file, place.row, tuple(files))

    def read(self, places: Places) -> dict[str, Tensor]:
        """Return name -> rows (n, ...) in the order of ``places``; see :meth:`rows`."""
        rows = self.rows(places)
        return {name: torch.cat([row[name] for row in rows]) for name in (rows[0] if rows else {})}

    def rows(self, places: Places) -> list[dict[str, Tensor]]:
        """Return each row as name -> (1, ...), in the order of ``places``; only these rows are read from disk.

        Raises:
            UserError: a file is gone, or a row's checksum is wrong; the damaged file is removed.
        """
        parts: list[dict[str, Tensor]] = [{} for _ in places.file]
        for number in dict.fromkeys(places.file.tolist()):
            path = self.folder / places.files[number]
            try:
                with safe_open(path, "pt") as file:
                    dtypes = json.loads(file.metadata()[FACTS])["dtypes"]
                    slices = {name: file.get_slice(name) for name in (*dtypes, CHECKSUMS)}
                    for position in np.flatnonzero(places.file == number).tolist():
                        row = int(places.row[position])
                        read = {name: part[row : row + 1] for name, part in slices.items()}
                        if _checksum(read, 0) != int(read.pop(CHECKSUMS)):
                            raise SafetensorError(f"row {row} is not what was written")
                        # A copy: what is read is a view of the file, which dies with the process when it is cut short.
                        parts[position] = {
                            name: value.to(getattr(torch, dtypes[name]), copy=True) for name, value in read.items()
                        }
            except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                _remove(path)
                raise UserError(
                    f"{path} of the cache of encoded data is damaged or gone ({error}); it is removed now. Run again "
                    "(with --resume, if the run has begun), and its samples are encoded again"
                ) from error
        return parts

    def touch(self) -> None:
        """Note that the store is used now, for `flash-diffusion cache prune`, and remove what killed runs left."""
        if not self.folder.is_dir():
            return
        remove_partials(self.folder)
        self._describe()
        try:
            os.utime(self.folder / ABOUT)
        except OSError as error:
            logger.info("%s is read-only (%s): `cache prune` can't see that it was used", self.folder, error.strerror)

    def _describe(self) -> None:
        if not (self.folder / ABOUT).is_file():
            text = json.dumps({"format": FORMAT, **self.about}, indent=2) + "\n"
            write_whole(self.folder / ABOUT, lambda partial: partial.write_text(text, encoding="utf-8"), shared=True)

    def _stored(self, value: Tensor) -> Tensor:
        value = value.detach().cpu()
        wide = value.is_floating_point() and value.element_size() > self.dtype.itemsize
        return (value.to(self.dtype) if wide else value).contiguous()

    def read_keys(self, path: Path) -> Keys | None:
        """Return the keys (n, 16) of a file, or None after removing a damaged file."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()[FACTS])
                keys: Keys = file.get_tensor(KEYS).clone().numpy()
                lengths = {file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
            if facts["format"] != FORMAT or facts["keys"] != zlib.crc32(keys.tobytes()):
                raise SafetensorError("its keys are not what was written")
            if lengths != {len(keys)} or keys.shape != (len(keys), KEY_BYTES) or keys.dtype != np.uint8:
                raise SafetensorError("its tensors have different numbers of rows")
        except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            logger.warning(
                "%s of the cache is damaged (%s): it is removed, and its samples are encoded again", path, error
            )
            _remove(path)
            return None
        return keys


def _remove(path: Path) -> None:
    """Remove a damaged file.

    Raises:
        UserError: the folder is read-only.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path} of the cache is damaged, and can't be removed ({error.strerror}); remove it yourself, or set "
            "data.cache to another folder"
        ) from error


def check_file(store: Store, path: Path) -> str:
    """Check every row of a file; remove a damaged file, and return what is wrong with it, empty for nothing."""
    keys = store.read_keys(path)
    if keys is None:
        return "its header or keys are damaged"
    rows = np.arange(len(keys), dtype=np.int32)
    try:
        store.rows(Places(np.zeros(len(keys), np.int32), rows, (path.name,)))
    except UserError as error:
        return str(error.__cause__)
    return ""


def _checksum(rows: Mapping[str, Tensor], row: int) -> int:
    """Return the CRC-32 of a row over name, dtype, shape and content of all tensors, in the order of their names."""
    value = 0
    for name in sorted(rows):
        if name != CHECKSUMS:
            tensor = rows[name][row]
            value = zlib.crc32(repr((name, tensor.dtype, tuple(tensor.shape))).encode(), value)
            value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value
