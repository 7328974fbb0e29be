"""Learning rates over a run, and the moving average of the weights that train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """The exponential moving average of parameters: average <- decay * average + (1 - decay) * parameter.

    In update n the decay is min(decay, (1 + n) / (10 + n)), so that the first weights fade quickly.

    Args:
        parameters: name -> parameter, on any device.
        decay: the largest decay, in [0, 1); 0 makes the average equal to the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the parameters, as they are after ``updates`` updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters their averages inside the ``with`` block."""
        kept = {name: value.data for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            value.data = self.tensors[name]
        try:
            yield
        finally:
            for name, value in self.parameters.items():
                value.data = kept[name]


def warmup_cosine(update: int, progress: float, *, warmup: int = 0, flat: float = 0.0, final: float = 0.0) -> float:
    """Return the learning rate as a share of its full value: a linear rise, then flat, then half a cosine.

    Args:
        update: updates made before this one.
        progress: of the whole run, in 0..1.
        warmup: updates of the rise, 0 for none.
        flat: progress at which the cosine starts to fall, in [0, 1).
        final: the share at progress 1.
    """
    rise = min(1.0, (update + 1) / warmup) if warmup else 1.0
    fallen = min(1.0, max(0.0, progress - flat) / (1 - flat))
    return rise * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fallen)))
