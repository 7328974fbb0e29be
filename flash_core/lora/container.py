"""The safetensors container: the header is checked first, then the tensors are mapped, never copied.

A file from the web may be truncated, mislabelled or malicious. The header gives the type, shape and place of every
tensor. So the header is checked against the file's size, with bounds on time and memory, before anything is read.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

LENGTH_BYTES = 8  # the header's length, little-endian, is what a file begins with
# Real headers are far smaller: a LoRA on every layer of SDXL has 4,000 tensors in 0.6 MB; trainers add tag counts.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_STRINGS = 150_000  # five a tensor, and what trainers tell of themselves
MAX_DIMENSIONS = 8

# The types that this torch can hold, and bytes an element.
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",  # unsigned types are younger than the oldest torch that ComfyUI runs on
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, spelt) for name, spelt in _TORCH_NAMES.items() if hasattr(torch, spelt)
}
DTYPE_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
# How one number is read without torch.
NUMBER_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "U8": "<B", "I8": "<b"}


class LoraError(ValueError):
    """Raised for a file that can't be used as a LoRA; the message names the problem and a solution."""


@dataclass(frozen=True)
class Container:
    """A mapped safetensors file whose header was checked.

    The file is opened once: a file that replaces it on the disk later does not change the tensors here.

    Attributes:
        path: the file.
        shapes: every tensor's shape by its key, in the file's order.
        places: every tensor's type and the position of its first byte in the file, by key.
        header: the file's own strings (``__metadata__``).
        memory: the file's bytes.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, tuple[str, int]]
    header: Mapping[str, str]
    memory: mmap.mmap | bytearray

    def number(self, key: str) -> float | None:
        """Return the first number of a tensor; None for booleans and for rare types of whole numbers.

        The usual types are read without torch: files have hundreds of alphas.
        """
        dtype, begin = self.places[key]
        raw = self.memory[begin : begin + DTYPE_BYTES[dtype]]
        if dtype == "BF16":  # a float32 without its lower half
            dtype, raw = "F32", b"\0\0" + raw
        number = NUMBER_FORMATS.get(dtype)
        if number is None and DTYPES[dtype].is_floating_point:  # 8 bits
            return float(torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).to(torch.float32)[0])
        return None if number is None else float(struct.unpack(number, raw)[0])

    def tensor(self, key: str) -> Tensor:
        """Return a tensor whose bytes are read from the disk at first use.

        The header is checked already; safetensors' own reader would double the time of loading a LoRA.
        """
        dtype, begin = self.places[key]
        shape = self.shapes[key]
        count, width = math.prod(shape), DTYPE_BYTES[dtype]
        if not count:
            return torch.empty(shape, dtype=DTYPES[dtype])
        if begin % width:  # writers align tensors; where one has not, a copy is
            raw = bytearray(self.memory[begin : begin + count * width])
            return torch.frombuffer(raw, dtype=DTYPES[dtype]).reshape(shape)
        return torch.frombuffer(self.memory, dtype=DTYPES[dtype], count=count, offset=begin).reshape(shape)

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors with these keys."""
        return {key: self.tensor(key) for key in keys}


def open_container(path: Path, *, mapped: bool = True) -> Container:
    """Check a file's header, and map it.

    Args:
        mapped: True maps the bytes, False reads all of them now, for network drives that map badly. Default: True.

    Raises:
        LoraError: no such file, not safetensors (a pickle is named as such), cut off, or a header that is too large,
            contradicts itself or the file's size.
    """
    if not path.is_file():
        raise LoraError(f"there is no LoRA file at {path}; give a .safetensors file or a PEFT folder")
    try:
        with path.open("rb") as file:
            text, size = _header(path, file)
            shapes, places, header = _parse(path, text, size)
            memory: mmap.mmap | bytearray
            if mapped:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # as if writable, or torch warns
            else:
                file.seek(0)
                memory = bytearray(file.read())
    except OSError as error:
        raise unreadable(path, str(error)) from error
    return Container(path, shapes, places, header, memory)


def _header(path: Path, file: BinaryIO) -> tuple[bytes, int]:
    """Return the header's bytes and the file's size, with bounds on the header."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    if len(start) < LENGTH_BYTES or length > size - LENGTH_BYTES:
        raise unreadable(path, "it is shorter than its header says" if start else "it is empty", start)
    if length > MAX_HEADER_BYTES:
        raise unreadable(path, f"its header has {length:,} bytes; the limit is {MAX_HEADER_BYTES:,}", start)
    text = file.read(length)
    if not text.startswith(b"{"):
        raise unreadable(path, "its header is not JSON", start)
    # Each tensor is an object with two lists and five strings; counted before anything is built from them.
    strings = (text.count(b'"') - text.count(b'\\"')) // 2
    if text.count(b"{") + text.count(b"[") > 4 * MAX_TENSORS or strings > MAX_STRINGS:
        raise unreadable(
            path, f"its header lists more than {MAX_TENSORS:,} tensors, or more than {MAX_STRINGS:,} strings"
        )
    return text, size


def _parse(
    path: Path, text: bytes, size: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, int]], dict[str, str]]:
    """Return the shapes, the types and places of the tensors, and the file's strings."""
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        header = entries.pop("__metadata__", {})
        if not isinstance(header, dict) or not all(isinstance(value, str) for value in header.values()):
            raise ValueError("its metadata is not a table of strings")
        shapes, places = _layout(entries, LENGTH_BYTES + len(text), size)
    except RecursionError as error:
        raise unreadable(path, "its header is nested too deeply") from error
    except ValueError as error:
        raise unreadable(path, str(error)) from error
    return shapes, places, header


def unreadable(path: Path, reason: str, start: bytes = b"") -> LoraError:
    """Return the error for a damaged safetensors file, or for a pickle (told by its first bytes)."""
    if start.startswith((b"PK", b"\x80")):
        return LoraError(
            f"{path.name} is a pickle, the format of PyTorch's .pt, .ckpt and .bin files. Loading a pickle can run "
            "code, so pickles are refused. Ask the author for a .safetensors file, or convert the pickle on a computer "
            "without valuable data"
        )
    return LoraError(
        f"{path.name} is not a readable safetensors file ({reason}). The file may be truncated: download it again"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"its header names {twice[:80]!r} twice")
    return table


def _layout(
    entries: Mapping[str, Any], start: int, size: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, int]]]:
    """Return every tensor's shape, and its type and place; check that the tensors fill the file without a gap."""
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[str, int]] = {}
    spans: list[tuple[int, int]] = []
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"tensor {key[:80]!r} lacks its type, shape or place")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        width = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
        if width is None:
            raise ValueError(f"tensor {key[:80]!r} has the type {str(dtype)[:20]!r}, which PyTorch can't hold")
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(span) or len(span) != 2:
            raise ValueError(f"tensor {key[:80]!r} has a shape or a place that is not a short list of whole numbers")
        begin, end = span
        if end - begin != width * math.prod(shape):
            raise ValueError(f"tensor {key[:80]!r} of shape {shape} does not fill its place of {end - begin:,} bytes")
        shapes[key] = tuple(shape)
        places[key] = dtype, start + begin
        spans.append((begin, end))
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise ValueError("its tensors overlap or leave gaps")
        reached = end
    if reached != size - start:
        raise ValueError(f"its tensors take {reached:,} bytes, but it holds {size - start:,}")
    return shapes, places


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)
