"""Read the lines of a run's `log.jsonl`, and pass over those that a killed session left unfinished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each line and its entry; the entry of a broken line is None. A log that is not there has no lines."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        yield line, entry if isinstance(entry, dict) and isinstance(entry.get("update"), int) else None
