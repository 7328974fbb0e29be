"""A run's pictures on disk, written as they are made, so that a killed evaluation goes on where it stopped.

The folder holds ``000000397133.png``, ... (COCO's numbers), ``made_from.json`` (everything the pictures depend on) and
``seconds-0.jsonl``, ... (the time of each batch, one file per process). Files are written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...files import write_whole

if TYPE_CHECKING:
    from PIL import Image

ORIGIN = "made_from.json"


class PictureFolder:
    """The pictures of one run.

    Args:
        folder: holds this run only.
        origin: everything that the pictures depend on.
        process: number of this process. Process 0 writes ``origin``, all processes compare with it.

    Raises:
        UserError: the folder holds pictures that were made from something else.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any], process: int = 0) -> None:
        self.folder = folder
        self.process = process
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ORIGIN
        if path.is_file():
            there = _read_origin(path)
            for name in origin:
                if there.get(name) != origin[name]:
                    raise UserError(
                        f"{folder} holds pictures made from something else: {name} is {there.get(name)!r} there and "
                        f"{origin[name]!r} now; choose another --output, or remove the folder"
                    )
        elif any(folder.glob("*.png")):
            raise UserError(
                f"{folder} holds pictures without {ORIGIN}, so nobody knows what they were made from; remove the folder"
            )
        elif process == 0:
            text = json.dumps(dict(origin), indent=2) + "\n"
            write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def path(self, number: int) -> Path:
        """Return the path of the picture with a number, written or not."""
        return self.folder / f"{number:012d}.png"

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Return the ``numbers`` whose picture is not there."""
        return [number for number in numbers if not self.path(number).is_file()]

    def save(self, number: int, picture: Image.Image) -> None:
        """Write a picture without loss."""
        write_whole(self.path(number), lambda partial: picture.save(partial, "PNG"))

    def add_time(self, pictures: int, seconds: float) -> None:
        """Add the time of a batch."""
        with (self.folder / f"seconds-{self.process}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"pictures": pictures, "seconds": seconds}) + "\n")

    def seconds_per_picture(self) -> float | None:
        """Return the median batch's seconds per picture; the median hides the extra cost of first batches."""
        rates = []
        for path in self.folder.glob("seconds-*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # a killed process may leave half a line, and the next one go on in it
                    continue
                rates.append(entry["seconds"] / entry["pictures"])
        return sorted(rates)[len(rates) // 2] if rates else None


def _read_origin(path: Path) -> dict[str, Any]:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there, dict):
            raise ValueError("it holds no entries by name")
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}), so nobody knows what the pictures beside it were made from; remove the "
            f"folder {path.parent}, or choose another --output"
        ) from error
    return there
