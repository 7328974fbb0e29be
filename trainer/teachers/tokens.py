"""Read the tokenizers of a model's folder without its weights, to count the tokens of captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

LONGEST = 512  # tokens; tokenizers of T5 name no length, or one that no model reads


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer, and the most tokens that its text encoder reads, marks of begin and end included."""

    part: Any
    length: int

    def count(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens of each caption, marks of begin and end included."""
        return [len(ids) for ids in self.part(list(captions), verbose=False).input_ids] if captions else []


def load_tokenizers(folder: Path) -> list[Tokenizer]:
    """Return the tokenizers of a diffusers folder: ``tokenizer``, ``tokenizer_2``, ...

    Raises:
        UserError: a tokenizer can't be read.
    """
    from transformers import AutoTokenizer

    found = []
    for path in sorted(folder.glob("tokenizer*")):
        if not path.is_dir():
            continue
        try:
            part = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"the tokenizer {path} can't be read ({error})") from error
        found.append(Tokenizer(part, min(part.model_max_length, _positions(folder, path.name), LONGEST)))
    return found


def _positions(folder: Path, tokenizer: str) -> int:
    """Return the positions that a tokenizer's text encoder has; ``LONGEST`` if it names none."""
    config = folder / tokenizer.replace("tokenizer", "text_encoder") / "config.json"
    if not config.is_file():
        return LONGEST
    return int(json.loads(config.read_text(encoding="utf-8")).get("max_position_embeddings") or LONGEST)
