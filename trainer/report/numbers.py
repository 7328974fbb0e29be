"""Write numbers as people read them, in pages and in the terminal. All signs are encodable in cp1252."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def number(value: float | None, digits: int = 3) -> str:
    """Return ``0.0123``, ``1.23``, ``12.3``, ``1230``: ``digits`` significant digits; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{min(decimals, 6)}f}"


def signed(value: float | None) -> str:
    """Return ``+0.3`` or ``-0.3``; a dash for None."""
    if value is None:
        return "–"
    return f"{'-' if value < 0 else '+'}{number(abs(value))}"


def share(value: float | None, decimals: int = 0) -> str:
    """Return ``99 %`` for 0.987; a dash for None."""
    return "–" if value is None else f"{100 * value:.{decimals}f} %"


def interval(found: Mapping[str, Any] | None, write: Callable[[float | None], str] = number) -> str:
    """Return ``0.1 … 0.2`` of an estimate's ``low`` and ``high``; empty where there is none."""
    if found is None or found["low"] is None:
        return ""
    return f"{write(found['low'])} … {write(found['high'])}"


def seconds(value: float | None) -> str:
    """Return ``1.23 s`` or ``12.3 ms``; a dash for None."""
    if value is None:
        return "–"
    return f"{number(value)} s" if value >= 0.1 else f"{number(1000 * value)} ms"


def listed(values: Sequence[object]) -> str:
    """Return ``4, 2 or 1``."""
    *rest, last = [str(value) for value in values]
    return f"{', '.join(rest)} or {last}" if rest else last


def counted(count: int, noun: str) -> str:
    """Return ``1 step`` or ``4 steps``; a noun in -s takes -es."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]
