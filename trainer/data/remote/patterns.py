"""Expand brace patterns such as ``shard-{000..099}.tar``, and show URLs without their secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from ...config.data import is_url
from ...errors import UserError

RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
MOST_SHARDS = 1_000_000  # of one pattern


def expand(given: Path | str | Sequence[Path | str]) -> Iterator[Path | str]:
    """Yield the paths and URLs that ``data.path`` names, in their order: patterns expanded, ``~`` too.

    Raises:
        UserError: a pattern can't be expanded.
    """
    for one in [given] if isinstance(given, Path | str) else given:
        local = isinstance(one, Path)
        text = str(one.expanduser()) if isinstance(one, Path) else one
        if "{" not in text or (isinstance(one, Path) and one.expanduser().exists()):
            yield Path(text) if local else text
            continue
        for found in _expanded(text):
            yield Path(found) if local else found


def _expanded(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    # The backslash of a Windows path is no escape.
    escape = is_url(pattern) or "\\" not in pattern
    try:
        # braceexpand keeps all numbers of a range in memory.
        too_many = any(abs(int(last) - int(first)) >= MOST_SHARDS for first, last in RANGE.findall(pattern))
        found: list[str] = [] if too_many else list(islice(braceexpand(pattern, escape=escape), MOST_SHARDS + 1))
    except ValueError as error:
        raise UserError(
            f"data.path: the pattern {shown(pattern)} can't be expanded ({error}); expected one such as "
            "shard-{000..099}.tar"
        ) from error
    if too_many or len(found) > MOST_SHARDS:
        raise UserError(f"data.path: the pattern {shown(pattern)} names more than {MOST_SHARDS} shards; give fewer")
    return found


def shown(location: Path | str) -> str:
    """Return a path or URL for messages: without user name, password and query, which may hold secrets."""
    text = str(location)
    if not is_url(text):
        return text
    parts = urlsplit(text)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def title(given: Path | str | Sequence[Path | str]) -> str:
    """Return ``data.path`` in a few words for messages: its first part, and how many others there are."""
    first, *others = [given] if isinstance(given, Path | str) else given
    return shown(first) + (f" and {len(others)} more" if others else "")


def file_name(location: Path | str) -> str:
    """Return the name of a shard's file."""
    return location.name if isinstance(location, Path) else shown(location).rpartition("/")[2]
