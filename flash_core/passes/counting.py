"""A denoiser that counts the passes of another one, by the term that asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, Role
from ..process import Process
from .asking import FORWARD_AND_BACKWARD, asking


class CountedDenoiser:
    """A :class:`~..denoiser.Denoiser` that counts the passes of the one it holds.

    Attributes:
        counts: term -> passes, all branches of guidance; see ``asking.py``. Several threads may ask at once.
        unconditional: term -> passes for guidance's unconditional branch; they are in ``counts`` too.
        images: training images that the counted passes were for; whoever makes the updates adds them.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.counts: Counter[str] = Counter()
        self.unconditional: Counter[str] = Counter()
        self.images = 0
        self._role: Role = "teacher"
        self._lock = Lock()

    @property
    def process(self) -> Process:
        """The noise process of the model."""
        return self.denoiser.process

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's output (B, C, H, W), and count B passes."""
        self._count(z_t)
        return self.denoiser.predict(z_t, t, conditioning)

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Return hidden states as maps (B, C_i, H_i, W_i), and count B passes."""
        self._count(z_t)
        return self.denoiser.features(z_t, t, conditioning)

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Switch to ``role`` inside the block, and back to the previous one after it."""
        previous, self._role = self._role, role
        try:
            with self.denoiser.role(role):
                yield
        finally:
            self._role = previous

    def _count(self, z_t: Tensor) -> None:
        learns = torch.is_grad_enabled() and (z_t.requires_grad or self._role != "teacher")
        term, unconditional = asking()
        with self._lock:
            self.counts[term] += len(z_t) * (FORWARD_AND_BACKWARD if learns else 1)
            self.unconditional[term] += unconditional

    def forget(self, term: str | None = None) -> None:
        """Begin to count anew: the passes of one term, or all passes and images."""
        if term is None:
            self.images = 0
        for counts in (self.counts, self.unconditional):
            for name in list(counts) if term is None else [term]:
                counts.pop(name, None)
