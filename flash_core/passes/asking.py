"""Passes of the network: what they are for, so that they can be counted.

A pass is one forward pass for one sample. A forward pass that a backward pass follows counts three: going back costs
about two more. A recomputed activation (gradient checkpointing) is not counted, and a feature pass that stops after the
last block that is read counts as a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

FORWARD_AND_BACKWARD = 3

_TERM: ContextVar[str] = ContextVar("term", default="other")
_UNCONDITIONAL: ContextVar[int] = ContextVar("unconditional", default=0)


@contextmanager
def asked_by(term: str) -> Iterator[None]:
    """Count passes inside the block as those of ``term``; an inner block goes before an outer one."""
    token = _TERM.set(term)
    try:
        yield
    finally:
        _TERM.reset(token)


@contextmanager
def of_them_unconditional(count: int) -> Iterator[None]:
    """Count ``count`` samples of the pass inside the block as guidance's unconditional branch."""
    token = _UNCONDITIONAL.set(count)
    try:
        yield
    finally:
        _UNCONDITIONAL.reset(token)


def asking() -> tuple[str, int]:
    """Return the term that asks now (``other`` outside of all blocks), and the unconditional samples of the pass."""
    return _TERM.get(), _UNCONDITIONAL.get()
