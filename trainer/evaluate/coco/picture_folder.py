"""A run's pictures on disk, written as they are made, so that a killed evaluation goes on where it was.

The folder holds ``000000397133.png``, ... (the numbers are COCO's), ``made_from.json`` (what they were made from) and
``seconds-0.jsonl``, ... (what they cost, one file a process). A file appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from PIL import Image

ORIGIN = "made_from.json"


class PictureFolder:
    """The pictures of one run.

    Args:
        folder: of this run alone.
        origin: everything that decides what the pictures look like.
        process: which of several processes this is. The first one writes ``origin``, all compare.

    Raises:
        UserError: the folder holds pictures that were made from something else.
    """

    def __init__(self, folder: Path, origin: Mapping[str, Any], process: int = 0) -> None:
        self.folder = folder
        self.process = process
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ORIGIN
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            for name in origin:
                if there.get(name) != origin[name]:
                    raise UserError(
                        f"{folder} holds pictures made from something else: {name} is {there.get(name)!r} there and "
                        f"{origin[name]!r} now; choose another --output, or remove that folder"
                    )
        elif any(folder.glob("*.png")):
            raise UserError(f"{folder} holds pictures without {ORIGIN}, which says what they are; remove that folder")
        elif process == 0:
            self._publish(path, (json.dumps(dict(origin), indent=2) + "\n").encode())

    def path(self, number: int) -> Path:
        """Where the picture with a number is or will be."""
        return self.folder / f"{number:012d}.png"

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of ``numbers`` whose picture is not there."""
        return [number for number in numbers if not self.path(number).is_file()]

    def save(self, number: int, picture: Image.Image) -> None:
        """Write a picture, losslessly; half a picture never stands under its name."""
        import io

        stream = io.BytesIO()
        picture.save(stream, "PNG")
        self._publish(self.path(number), stream.getvalue())

    def add_time(self, pictures: int, seconds: float) -> None:
        """Note what a batch has cost."""
        with (self.folder / f"seconds-{self.process}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"pictures": pictures, "seconds": seconds}) + "\n")

    def seconds_per_picture(self) -> float | None:
        """The median batch's, over every start and process: a first batch's extra cost does not show in it."""
        rates = []
        for path in self.folder.glob("seconds-*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # a killed process may leave half a line, and the next one go on in it
                    continue
                rates.append(entry["seconds"] / entry["pictures"])
        return sorted(rates)[len(rates) // 2] if rates else None

    def _publish(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f"{path.name}.{self.process}.part")
        partial.write_bytes(content)
        os.replace(partial, path)
