"""Make independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *purpose: str | int) -> int:
    """Return a 32-bit seed for one purpose, independent of the seeds of other purposes.

    The CPU's generator reads only 32 bits of its seed, so seed and purpose are hashed, not packed side by side.
    """
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:4], "little")


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a generator for one purpose. It is on the CPU, so that it draws the same numbers for every device."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))
