"""Prompts that are longer than text encoders read: how they are found, and the libraries' warnings about them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

# Of diffusers' pipelines and of tokenizers; their texts are full of padding tokens, or alarming without a reason.
LIBRARY_WARNINGS = ("was truncated because", "longer than the specified maximum sequence length")
TOKENIZERS = "transformers.tokenization_utils_base"
SHOWN = 60  # characters of a prompt in a message


def cut(
    prompts: Sequence[str], parts: Mapping[str, Any], lengths: Mapping[str, int], as_read: Callable[[str], str]
) -> list[bool]:
    """Return for each prompt True if no tokenizer keeps all of its tokens.

    Args:
        parts: a pipeline's parts.
        lengths: name of a tokenizer among the parts -> the longest prompt in tokens.
        as_read: returns a prompt as the tokenizers get it, such as in lower case.
    """
    if not prompts:  # tokenizers take no empty list
        return []
    texts = [as_read(prompt) for prompt in prompts]
    longer = [
        [len(ids) > length for ids in parts[name](texts, verbose=False).input_ids] for name, length in lengths.items()
    ]
    return [all(column) for column in zip(*longer, strict=True)]


def cut_warning(prompt: str, length: int, count: int | None = None) -> str:
    """Return the warning about prompts that are longer than ``length`` tokens.

    Args:
        prompt: the first of them.
        count: how many they are; None where nobody has counted.
    """
    start = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
    if count is not None and count > 1:
        return (
            f"{count} prompts are longer than the {length} tokens that the text encoder reads; the rest of each has no "
            f"effect. The first one: {start!r}"
        )
    return (
        f"the prompt {start!r} is longer than the {length} tokens that the text encoder reads; the rest of it has no "
        "effect, as for all longer prompts"
    )


@contextmanager
def silent_libraries(pipeline: Any) -> Iterator[None]:
    """Hide the warnings of a pipeline and its tokenizers about long prompts."""

    def other(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in LIBRARY_WARNINGS)

    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, TOKENIZERS)]
    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)
