"""The order of the samples: a function of seed and position, so that a checkpoint saves only the position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..seeds import stream


@dataclass(frozen=True)
class Order:
    """A new random permutation of ``length`` samples every epoch, from (seed, epoch).

    A position counts samples from the start of training. A batch may continue into the next epoch.
    """

    length: int
    seed: int

    def indices(self, position: int, count: int) -> Tensor:
        """Return the samples at ``position`` to ``position + count - 1``, (count,)."""
        parts = []
        while count > 0:
            epoch, offset = divmod(position, self.length)
            part = self.permutation(epoch)[offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return torch.cat(parts)

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of one epoch, (length,)."""
        return torch.randperm(self.length, generator=stream(self.seed, "order", epoch))
