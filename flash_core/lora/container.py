"""The safetensors container: its header is checked before anything is mapped, its tensors are mapped, never copied.

A file from the web may be cut off, mislabelled or made to hurt. The header alone tells all tensors' types, shapes and
places, so it is held against the file's size with bounds on time and memory, and only then handed to the library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

LENGTH_BYTES = 8  # the header's length, little-endian, is what a file begins with
# Real headers stay far below: a LoRA on every layer of SDXL has 4,000 tensors in 0.6 MB; trainers add tag counts.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8

# Bytes an element; the types that torch can hold.
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}


class LoraError(ValueError):
    """A file that can't be used as a LoRA; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Container:
    """A safetensors file whose header holds together.

    Attributes:
        path: where it lies.
        shapes: every tensor's shape by its key, in the file's order.
        header: the file's own strings (``__metadata__``).
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    header: Mapping[str, str]

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Some of its tensors, mapped: their bytes are read when they are first used.

        Raises:
            LoraError: the library finds the file wanting all the same.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise unreadable(self.path, str(error)) from error


def open_container(path: Path) -> Container:
    """Check a file's header.

    Raises:
        LoraError: no such file, not safetensors (a pickle is named as such), cut off, or a header that is too large,
            contradicts itself or the file's size.
    """
    if not path.is_file():
        raise LoraError(f"there is no LoRA file at {path}; give a .safetensors file or a PEFT folder")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH_BYTES)
            length = int.from_bytes(start, "little")
            if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
                raise unreadable(path, "it is shorter than its header says" if start else "it is empty", start)
            if length > MAX_HEADER_BYTES:
                raise unreadable(path, f"its header has {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read", start)
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, str(error)) from error
    if not text.startswith(b"{"):
        raise unreadable(path, "its header is not JSON", start)
    # Each tensor is an object with two lists; counted before anything is built from them.
    if text.count(b'"data_offsets"') > MAX_TENSORS or text.count(b"{") + text.count(b"[") > 4 * MAX_TENSORS:
        raise unreadable(path, f"its header lists more than {MAX_TENSORS:,} tensors")
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "its header is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise unreadable(path, reason) from error
    header = entries.pop("__metadata__", {})
    if not isinstance(header, dict) or not all(isinstance(value, str) for value in header.values()):
        raise unreadable(path, "its metadata is not a table of strings")
    try:
        shapes = _shapes(entries, size - LENGTH_BYTES - length)
    except ValueError as error:
        raise unreadable(path, str(error)) from error
    return Container(path, shapes, header)


def unreadable(path: Path, reason: str, start: bytes = b"") -> LoraError:
    """The error of a file that is no sound safetensors file, or a pickle by its first bytes."""
    if start.startswith((b"PK", b"\x80")):
        return LoraError(
            f"{path.name} is a pickle (a PyTorch .pt/.ckpt/.bin file), whatever its name says. Loading it could "
            "run code, so it is refused; ask for a .safetensors file, or convert it on a machine you trust to"
        )
    return LoraError(
        f"{path.name} is not a readable safetensors file ({reason}); download it again, it may be truncated"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"its header names {twice[:80]!r} twice")
    return table


def _shapes(entries: Mapping[str, Any], data_bytes: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, where types, shapes and offsets agree and the tensors fill the file without a gap."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: list[tuple[int, int]] = []
    for key, entry in entries.items():
        name = repr(key[:80])
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"tensor {name} lacks its type, shape or place")
        width = DTYPE_BYTES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if width is None:
            raise ValueError(f"tensor {name} has the type {str(entry['dtype'])[:20]!r}, which PyTorch can't hold")
        shape, place = entry["shape"], entry["data_offsets"]
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(place) or len(place) != 2:
            raise ValueError(f"tensor {name} has a shape or a place that is not a short list of counts")
        begin, end = place
        if end - begin != width * math.prod(shape):
            raise ValueError(f"tensor {name} of shape {shape} does not fill its place of {end - begin:,} bytes")
        shapes[key] = tuple(shape)
        places.append((begin, end))
    reached = 0
    for begin, end in sorted(places):
        if begin != reached:
            raise ValueError("its tensors overlap or leave gaps")
        reached = end
    if reached != data_bytes:
        raise ValueError(f"its tensors take {reached:,} bytes, but it holds {data_bytes:,}")
    return shapes


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
