"""Count the tokens of captions: estimated by rules, or counted by a model's own tokenizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import UserError

CLIP_TOKENS = 75  # of 77, beside the marks of begin and end
LETTERS = 10  # of a word that is one token; about, in English
FURTHER_LETTERS = 6  # of a longer word's next tokens
WORDS = re.compile(r"[a-z]+|[0-9]|[^\s\w]+|[^\W\da-z_]|_", re.IGNORECASE)


def estimated_tokens(caption: str) -> int:
    """Return about how many tokens of CLIP a caption has.

    A word is one token up to 10 letters, and one more for every 6 further letters; a digit, a group of signs, and a
    letter outside a to z are one token each.
    """
    return sum(1 + max(0, -(-(len(word) - LETTERS) // FURTHER_LETTERS)) for word in WORDS.findall(caption))


def is_longer(model: str | None) -> tuple[Callable[[Sequence[str]], list[bool]], str]:
    """Return what finds captions that are too long, and how it counts, in words.

    Args:
        model: a diffusers folder with ``tokenizer`` folders; None: estimate.

    Raises:
        UserError: the folder has no tokenizer.
    """
    if model is None:
        words = f"estimated by rules: more than {CLIP_TOKENS} tokens of CLIP (--model counts them)"
        return lambda captions: [estimated_tokens(caption) > CLIP_TOKENS for caption in captions], words
    from ...teachers.tokens import load_tokenizers

    folder = Path(model).expanduser()
    tokenizers = load_tokenizers(folder)
    if not tokenizers:
        raise UserError(
            f"--model: {folder} has no folder called tokenizer; give a diffusers folder, or leave --model out for an "
            "estimate"
        )
    lengths = ", ".join(str(tokenizer.length) for tokenizer in tokenizers)

    def longer(captions: Sequence[str]) -> list[bool]:
        # Where one of several text encoders reads the whole caption, nothing is lost.
        counts = [[count > tokenizer.length for count in tokenizer.count(captions)] for tokenizer in tokenizers]
        return [all(column) for column in zip(*counts, strict=True)]

    return longer, f"counted by the tokenizers of {folder.name} ({lengths} tokens)"
