"""Read prompts without pictures: a text file with one prompt a line, a folder of .txt files, a JSON file."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...config import DataSection
from ...errors import UserError
from .captions import MARKS, BadCaption, captions_of, decoded_text, json_lines, loaded_json
from .names import is_hidden
from .samples import BadSample, LeftOut, RawSample

UNIT = 512  # prompts
SHAPES = (
    "a .txt file with one prompt a line, a folder of .txt files, or a .json file: a list of texts, or an object "
    "{name: text}"
)


class Prompts:
    """Prompts in the order of their file. Empty prompts are left out; repeated prompts stay.

    Raises:
        UserError: there are no prompts.
    """

    def __init__(self, data: DataSection, path: Path) -> None:
        self.path = path
        self.left_out = LeftOut()
        self._prefix, self._field = data.caption_prefix, data.caption_field
        self._texts = bytearray()
        self._ends = array("Q")
        self._names = array("I")  # line, entry or file of each prompt
        self._files: list[str] = []
        try:
            self._load(path)
        except (BadCaption, OSError) as error:
            raise UserError(f"data.path: {path} {error}") from error
        if not self._ends:
            raise UserError(f"data.path: no prompts in {path}; expected {SHAPES}")

    @property
    def title(self) -> str:
        """The path of the prompts."""
        return str(self.path)

    def __len__(self) -> int:
        return -(-len(self._ends) // UNIT)

    def stamp(self, unit: int) -> str | None:
        """Return None: prompts are in memory, so reading them again costs nothing."""
        return None

    def read(self, unit: int) -> Iterator[RawSample | BadSample]:
        """Yield the prompts of a unit."""
        for number in range(unit * UNIT, min((unit + 1) * UNIT, len(self._ends))):
            begin = self._ends[number - 1] if number else 0
            text = self._texts[begin : self._ends[number]].decode()
            place = self._names[number]
            name = f"{self.path.name}, entry {place}" if not self._files else str(self.path / self._files[place - 1])
            yield RawSample(name, None, (f"{self._prefix}{text}".strip(),))

    def _add(self, text: str, place: int) -> None:
        text = text.strip()
        if not text:
            self.left_out.empty += 1
            return
        self._texts += text.encode()
        self._ends.append(len(self._texts))
        self._names.append(place)

    def _load(self, path: Path) -> None:
        suffix = path.suffix.lower()
        if path.is_dir():
            self._load_folder(path)
        elif not path.is_file():
            raise UserError(f"data.path: there is no file {path}; expected {SHAPES}")
        elif suffix == ".json":
            self._load_json(loaded_json(path.read_bytes()))
        elif suffix == ".jsonl":
            for number, (where, row) in enumerate(json_lines(path), 1):
                self._add_value(row, number, where)
        else:
            self._load_lines(path)

    def _load_lines(self, path: Path) -> None:
        with path.open("rb") as file:
            marked = file.read(4).startswith(tuple(mark for mark, _ in MARKS))
            file.seek(0)
            lines = decoded_text(file.read()).encode().split(b"\n") if marked else file
            for number, line in enumerate(lines, 1):
                try:
                    self._add(decoded_text(line), number)
                except BadCaption as error:
                    raise BadCaption(f"{error} (line {number})") from error

    def _load_folder(self, path: Path) -> None:
        files = sorted(
            file.relative_to(path).as_posix()
            for file in path.rglob("*.txt")
            if file.is_file() and not any(map(is_hidden, file.relative_to(path).parts))
        )
        for file in files:
            self._files.append(file)
            try:
                self._add(decoded_text((path / file).read_bytes()), len(self._files))
            except BadCaption as error:
                raise BadCaption(f"holds {file}, which {error}") from error

    def _load_json(self, content: Any) -> None:
        if isinstance(content, Mapping) and isinstance(content.get("annotations"), list):
            content = content["annotations"]  # captions in COCO's format
        if isinstance(content, Mapping):
            entries = [(f"entry {name!r}", value) for name, value in content.items()]
        elif isinstance(content, list):
            entries = [(f"entry {number}", value) for number, value in enumerate(content, 1)]
        else:
            raise BadCaption(f"is neither a list nor an object; expected {SHAPES}")
        for number, (where, value) in enumerate(entries, 1):
            self._add_value(value, number, where)

    def _add_value(self, value: Any, number: int, where: str) -> None:
        try:
            texts = captions_of(value, self._field)
        except BadCaption as error:
            raise BadCaption(f"{error} ({where})") from error
        if texts is None:
            raise BadCaption(f"has no text in {where}; expected {SHAPES}, and data.caption_field for lists of objects")
        for text in texts:
            self._add(text, number)
