"""A batch that several processes share: each computes some of its samples, and all of them draw the same numbers.

A sample's noise, timestep or guidance must not depend on the process that computes the sample. So every process draws
the numbers of the whole batch from a stream of the same seed, and keeps the numbers of its own samples. One process
draws what it always drew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Draw: TypeAlias = Callable[[int, torch.Generator], Tensor]
"""``(count, generator) -> (count, ...)``: draws numbers for ``count`` samples."""


def unchanged(value: Tensor) -> Tensor:
    """Return ``value``, the sum over one process."""
    return value


@dataclass(frozen=True)
class SharedBatch:
    """The samples of a batch that this process has, and the stream that gives all samples their numbers.

    Attributes:
        generator: in the same state in every process.
        total: samples of the batch, in all processes together.
        own: positions in the batch of this process's samples, ascending.
        weight: what this process's mean counts in the mean over processes: 1 where every process has as many samples,
            0 for a process that has none and computes another sample in its place.
        add: sums a tensor over the processes.
        lockstep: every process must call the network equally often, because its weights are shared among processes.
    """

    generator: torch.Generator
    total: int
    own: tuple[int, ...]
    weight: float = 1.0
    add: Callable[[Tensor], Tensor] = unchanged
    lockstep: bool = False

    @property
    def alone(self) -> bool:
        """Return whether this process has all samples."""
        return len(self.own) == self.total

    def draw(self, draw: Draw) -> Tensor:
        """Draw numbers for all samples and return those of this process's samples (b, ...)."""
        drawn = draw(self.total, self.generator)
        return drawn if self.alone else drawn[torch.tensor(self.own, dtype=torch.long, device=drawn.device)]

    def weighted(self, value: Tensor) -> Tensor:
        """Return ``value`` times :attr:`weight`, unchanged where that is 1 and zeros where it is 0.

        The mean of the result over the processes is the mean over all samples.
        """
        return value if self.weight == 1 else value * self.weight

    def part(self, chosen: Sequence[bool]) -> tuple[list[int], SharedBatch]:
        """Return the samples for which ``chosen`` is True: their rows in this process's batch, and their batch.

        A process that has none of them takes its first sample, with weight 0: so it draws the same numbers and calls
        the network as often as the others. The rows are empty where no process has such a sample.

        Args:
            chosen: for each sample of all processes.

        Raises:
            ValueError: ``chosen`` speaks of another number of samples.
        """
        if len(chosen) != self.total:
            raise ValueError(f"this batch has {self.total} samples; got {len(chosen)} choices")
        places = {position: place for place, position in enumerate(p for p, taken in enumerate(chosen) if taken)}
        rows = [row for row, position in enumerate(self.own) if position in places]
        weight = self.weight * len(rows) * self.total / max(len(places) * len(self.own), 1)
        own = tuple(places[self.own[row]] for row in rows)
        if places and not rows:
            rows, own = [0], (0,)
        return rows, replace(self, total=len(places), own=own, weight=weight)

    def variance(self, values: Tensor) -> Tensor:
        """Return the unbiased variance () of ``values`` (b, ...) over the samples of all processes."""
        if self.alone:
            return values.var()
        own = values if self.weight else values[:0]
        count = self.total * values[0].numel()
        mean = self.add(own.sum()) / count
        variance: Tensor = self.add((own - mean).square().sum()) / max(count - 1, 1)
        return variance

    def norm(self, values: Tensor) -> Tensor:
        """Return the Euclidean norm () of ``values`` (b, ...) over the samples of all processes."""
        own = values if self.weight else values[:0]
        norm: Tensor = values.norm() if self.alone else self.add(own.square().sum()).sqrt()
        return norm


def strided_shares(total: int, ranks: int) -> list[tuple[int, ...]]:
    """Return the samples of each process: process r of n has the samples r, r + n, r + 2 n ..."""
    return [tuple(range(rank, total, ranks)) for rank in range(ranks)]


def even_shares(costs: Sequence[float], ranks: int) -> list[tuple[int, ...]]:
    """Return samples for each process: as many for each, and of nearly equal cost, so that none waits for another.

    From the dearest sample to the cheapest, the processes take turns forwards and backwards.

    Args:
        costs: of each sample; a multiple of ``ranks`` many.
    """
    order = sorted(range(len(costs)), key=lambda position: (-costs[position], position))
    turns = [[*range(ranks)], [*reversed(range(ranks))]]
    taken: list[list[int]] = [[] for _ in range(ranks)]
    for place, position in enumerate(order):
        taken[turns[place // ranks % 2][place % ranks]].append(position)
    return [tuple(sorted(own)) for own in taken]


Random: TypeAlias = torch.Generator | SharedBatch
"""Where numbers come from: a generator for a batch of its own, or a batch that processes share."""


def shared(source: Random, count: int) -> SharedBatch:
    """Return ``source`` as a batch; a generator gives one of ``count`` samples, all of them here."""
    if isinstance(source, SharedBatch):
        return source
    return SharedBatch(source, count, tuple(range(count)))


def generator_of(source: Random) -> torch.Generator:
    """Return the stream itself, for numbers that belong to no sample."""
    return source.generator if isinstance(source, SharedBatch) else source
