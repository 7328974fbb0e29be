"""Read captions: .txt, .caption and .json beside a picture, and tables of captions for the pictures of a folder."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .names import CAPTION_SUFFIXES

FIELDS = ("caption", "captions", "text", "prompt")  # of a caption, where data.caption_field is not set
FILE_FIELD = "file_name"  # as in Hugging Face's imagefolder
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.json")
# Texts in UTF-16 and UTF-32 begin with these bytes; UTF-32's first, because UTF-16's are a part of them.
MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


class BadCaption(ValueError):
    """A caption that can't be read; the message follows the file's name."""


def captions_beside(files: Mapping[str, Callable[[], bytes]], field: str | None) -> tuple[str, ...] | None:
    """Return the captions of the caption files beside a picture, None where there is none.

    Args:
        files: suffix (``txt``, ``caption``, ``json``) -> what reads the file.
        field: data.caption_field; where it is set, a .json file comes first.

    Raises:
        BadCaption: a file can't be read as captions.
    """
    suffixes = CAPTION_SUFFIXES if field is None else ("json", "txt", "caption")
    for suffix in suffixes:
        if suffix not in files:
            continue
        content = files[suffix]()
        if suffix != "json":
            return (decoded_text(content),)
        found = captions_of(loaded_json(content), field)
        if found is not None:
            return found
    return None


def decoded_text(content: bytes) -> str:
    """Return a text file's content without byte order mark, stripped: UTF-8, or UTF-16 and UTF-32 with their mark.

    Raises:
        BadCaption: the bytes are not such a text.
    """
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        return content.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise BadCaption(f"is not UTF-8 text ({error}); save it as UTF-8") from error


def loaded_json(content: bytes) -> Any:
    """Return the value of a JSON file.

    Raises:
        BadCaption: it is not JSON.
    """
    try:
        return json.loads(decoded_text(content))
    except BadCaption:
        raise
    except (ValueError, RecursionError) as error:
        raise BadCaption(f"is not JSON ({error}); mend or remove it") from error


def captions_of(value: Any, field: str | None) -> tuple[str, ...] | None:
    """Return the captions of a JSON value: a text, a list of texts, or an object with a field of these.

    None where an object has no field of captions, and for null and an empty list.

    Raises:
        BadCaption: the value is something else.
    """
    if isinstance(value, Mapping):
        names = FIELDS if field is None else (field,)
        name = next((name for name in names if name in value), None)
        return None if name is None else captions_of_field(value[name], name)
    return captions_of_field(value, None)


def captions_of_field(value: Any, field: str | None) -> tuple[str, ...] | None:
    """Return the captions of a text or a list of texts, None for null and an empty list.

    Raises:
        BadCaption: the value is something else.
    """
    texts = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    if value is None or not texts:
        return None
    where = "" if field is None else f" in the field {field!r}"
    if not all(isinstance(text, str) for text in texts):
        raise BadCaption(f"holds{where} {_shown(value)}; expected a text or a list of texts")
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadCaption(f"holds{where} half of a character ({error.reason}); save it as UTF-8") from error
    return tuple(text.strip() for text in texts)


class CaptionTable:
    """Captions by the name of their picture, packed: the texts, and 24 bytes for each."""

    def __init__(self) -> None:
        self._texts = bytearray()
        self._ends = array("Q")
        self._keys = array("Q")
        self._order: Any = None

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, name: str, captions: tuple[str, ...]) -> None:
        """Add captions of a picture; a second entry of one name adds further captions."""
        self._texts += json.dumps(captions).encode()
        self._ends.append(len(self._texts))
        self._keys.append(_key(name))
        self._order = None

    def find(self, *names: str) -> tuple[str, ...] | None:
        """Return the captions of the first of ``names`` that is in the table, None if no name is."""
        if not self._keys:
            return None
        keys = np.frombuffer(self._keys, np.uint64)
        if self._order is None:
            self._order = np.argsort(keys, kind="stable").astype(np.uint32 if len(keys) < 2**32 else np.uint64)
        for name in names:
            key = np.uint64(_key(name))
            first, last = (int(np.searchsorted(keys, key, side, sorter=self._order)) for side in ("left", "right"))
            if first < last:
                return tuple(text for place in self._order[first:last].tolist() for text in self._texts_at(place))
        return None

    def _texts_at(self, place: int) -> list[str]:
        begin = self._ends[place - 1] if place else 0
        texts: list[str] = json.loads(self._texts[begin : self._ends[place]])
        return texts


def _key(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def table_rows(path: Path, field: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield name of a picture, relative to the table's folder, and captions, for each row of a table of captions.

    Raises:
        UserError: the table can't be read; the message names the row.
    """
    try:
        for where, name, value in _rows(path):
            try:
                captions = captions_of(value, field)
            except BadCaption as error:
                raise BadCaption(f"{error} ({where})") from error
            if captions is None:
                names = sorted(map(str, value)) if isinstance(value, Mapping) else []
                wanted = " or ".join(FIELDS) if field is None else field
                raise BadCaption(
                    f"has no caption for {name} ({where}); expected a field {wanted}"
                    + (f", and there are {', '.join(names)}: set data.caption_field" if names else "")
                )
            yield name, captions
    except (BadCaption, OSError) as error:
        raise UserError(f"{path} {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield place, picture's name and value of each row."""
    if path.suffix == ".parquet":
        rows: Iterator[tuple[str, Any]] = _parquet_rows(path)
    elif path.suffix == ".csv":
        rows = _csv_rows(path)
    elif path.suffix == ".jsonl":
        rows = json_lines(path)
    else:
        content = loaded_json(path.read_bytes())
        if isinstance(content, Mapping):
            yield from ((f"entry {name!r}", str(name), value) for name, value in content.items())
            return
        if not isinstance(content, list):
            raise BadCaption("is neither an object {name: caption} nor a list of objects")
        rows = ((f"entry {number}", row) for number, row in enumerate(content, 1))
    for where, row in rows:
        name = row.get(FILE_FIELD) if isinstance(row, Mapping) else None
        if not isinstance(name, str) or not name:
            raise BadCaption(f"has no {FILE_FIELD!r} in {where}; expected the name of a picture beside the table")
        yield where, name, row


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each line of a .jsonl file. Blank lines are skipped.

    Raises:
        BadCaption: a line is not JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", loaded_json(line)
                except BadCaption as error:
                    raise BadCaption(f"{error} (line {number})") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = decoded_text(path.read_bytes())
    try:
        for row in (reader := csv.DictReader(io.StringIO(text, newline=""), strict=True)):
            if None in row:
                raise BadCaption(
                    f"has more cells than columns in line {reader.line_num}; put captions with commas into quotes"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise BadCaption(f"is not a readable .csv table ({error}); mend or remove it") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise BadCaption(
            "needs pyarrow, which is not installed; pip install pyarrow, or save the table as metadata.jsonl"
        ) from error
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise BadCaption(f"is not a readable .parquet table ({error}); mend or remove it") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
