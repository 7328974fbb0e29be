"""Independent random streams from one seed, see :mod:`~..flash_core.runs.seeds`."""

from __future__ import annotations

from ..flash_core.runs.seeds import seed_of, stream

__all__ = ["seed_of", "stream"]
