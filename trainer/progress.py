"""Tell how far a long preparation is, in a line of the log now and then."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

TELL_EVERY = 10.0  # seconds between lines


class Progress:
    """Counts the units of some work, and logs their share, speed and the time left.

    Args:
        what: the work, at the start of each line: "encoding pictures".
        units: what is counted: "pictures".
        total: the units of the whole work.
    """

    def __init__(self, what: str, units: str, total: int) -> None:
        self.what = what
        self.units = units
        self.total = total
        self.done = 0
        self.began = self.told = time.monotonic()

    def advance(self, count: int) -> None:
        """Count ``count`` units as done, and log a line when the last one is some seconds old."""
        self.done += count
        now = time.monotonic()
        if now - self.told < TELL_EVERY:
            return
        self.told = now
        speed = self.done / (now - self.began)
        left = (self.total - self.done) / speed
        logger.info(
            "%s: %d of %d %s (%.0f %%), %.3g a second, about %s left",
            self.what, self.done, self.total, self.units, 100 * self.done / self.total, speed, in_words(left),
        )  # fmt: skip


def in_words(seconds: float | None) -> str:
    """Return a time such as ``40 s``, ``12 min`` or ``3.5 h``; ``?`` where it is unknown."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def size_in_words(size: float) -> str:
    """Return a number of bytes such as ``340 MB`` or ``1.2 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"
