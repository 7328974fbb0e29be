"""Files: hashes that tell whether two are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """A hash of a model's weights, configurations and vocabularies, 16 hexadecimal digits.

    Files are told by their path inside the folder. Of the folder's own files, cards and notes on the training do not
    count, only weights and ``config.json``; of a configuration, neither the layout nor what begins with an underscore
    (which library wrote it, and where).
    """
    weights = {*folder.rglob("*.safetensors")}
    if not weights:
        raise FileNotFoundError(f"no .safetensors weights in {folder}; expected a model folder in diffusers' layout")
    settings = {*folder.glob("config.json"), *folder.glob("*/*.json"), *folder.glob("*/*.txt")}
    digest = hashlib.sha256()
    for path in sorted(weights | settings):
        digest.update(f"{path.relative_to(folder).as_posix()}:".encode())
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if not key.startswith("_")}
            digest.update(json.dumps(content, sort_keys=True).encode())
            continue
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def fingerprint_texts(texts: Sequence[str]) -> str:
    """A hash of a list of texts in its order, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The beginning of a file's SHA-256, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
