"""How a run changes over time: the learning rate's schedule and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..config import OptimizerSection


class Average:
    """The exponential moving average of parameters; young averages forget faster, so that the start fades.

    Args:
        parameters: what is averaged, by name.
        decay: of one update, in the long run; 0 follows the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters after ``updates`` updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold their average inside the block."""
        kept = {name: value.data for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            value.data = self.tensors[name]
        try:
            yield
        finally:
            for name, value in self.parameters.items():
                value.data = kept[name]


def learning_rate_factor(section: OptimizerSection, update: int, progress: float) -> float:
    """The learning rates as a share of their full value, before the update numbered ``update`` from 0.

    Args:
        progress: of the whole run, in 0..1.
    """
    factor = min(1.0, (update + 1) / section.warmup) if section.warmup else 1.0
    if section.schedule == "cosine":
        fallen = max(0.0, progress - section.decay_from) / (1 - section.decay_from)
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))
    return factor
