"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed for one purpose, unrelated to those of other purposes.

    The CPU's generator reads 32 bits of its seed, so seed and purpose are hashed instead of packed side by side.
    """
    return int.from_bytes(hashlib.sha256(repr((seed, *purpose)).encode()).digest()[:4], "little")


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator for one purpose, on the CPU: it draws the same on every machine's device."""
    return torch.Generator().manual_seed(seed_of(seed, *purpose))
