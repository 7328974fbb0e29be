"""Change the strings in a file's header; the tensors keep every bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from .container import LENGTH_BYTES, open_container

ALIGNMENT = 8  # safetensors fills its header with spaces up to a multiple of this


def change_header(path: Path, changes: Mapping[str, str]) -> None:
    """Set strings of a safetensors file's header, completely or not at all; other strings and all tensors stay.

    Raises:
        LoraError: there is no such file, or it is damaged.
        OSError: the file can't be written.
    """
    open_container(path, mapped=False)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with path.open("rb") as old, partial.open("wb") as new:
            length = int.from_bytes(old.read(LENGTH_BYTES), "little")
            entries = json.loads(old.read(length))
            entries["__metadata__"] = {**entries.get("__metadata__", {}), **changes}
            text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % ALIGNMENT)
            new.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
            shutil.copyfileobj(old, new)
        shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
