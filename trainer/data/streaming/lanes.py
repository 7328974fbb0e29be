"""The order of a stream: lanes of shards, each with a shuffle buffer. See docs/adr/0015-lanes.md.

The sample at position p is number p // L of lane p % L, where L is the number of lanes. Lanes depend on the seed alone,
so any number of processes and workers reads the same order. Each reader opens only the lanes that it needs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Generic, TypeVar

import torch

from ...errors import UserError
from ...seeds import seed_of, stream

Item = TypeVar("Item")

EMPTY_EPOCHS = 100  # of a lane, one after the other: then no shard has a usable sample


@dataclass(frozen=True)
class LanePlan:
    """Which shards each lane reads, and in which order its samples come.

    Attributes:
        shards: number of shards.
        lanes: L, at most as many as shards.
        buffer: samples of a lane that wait, of which the next is drawn; 1 keeps the order of the shards.
        seed: of the order.
    """

    shards: int
    lanes: int
    buffer: int
    seed: int

    @classmethod
    def of(cls, shards: int, lanes: int, shuffle: int, seed: int) -> LanePlan:
        """Return the plan of a recipe.

        Args:
            lanes: data.lanes.
            shuffle: data.shuffle, over all lanes.
        """
        lanes = min(lanes, shards)
        return cls(shards, lanes, max(1, shuffle // lanes), seed)

    def dealt(self, lane: int, epoch: int) -> tuple[int, ...]:
        """Return the shards of a lane in an epoch. In each epoch all shards are mixed, then dealt to the lanes."""
        return _mixed(self.shards, self.seed, epoch)[lane :: self.lanes]

    def shuffle(self, lane: int, epoch: int) -> Shuffle[Item]:
        """Return the empty buffer of a lane at the begin of an epoch."""
        return Shuffle(self.buffer, random.Random(seed_of(self.seed, "shuffle", lane, epoch)))


@lru_cache(maxsize=64)
def _mixed(shards: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(torch.randperm(shards, generator=stream(seed, "shards", epoch)).tolist())


class Shuffle(Generic[Item]):
    """A shuffle buffer. What comes out depends on the number of items alone, not on the items.

    Attributes:
        waiting: the items inside.
    """

    def __init__(self, size: int, draw: random.Random) -> None:
        self.size = size
        self.waiting: list[Item] = []
        self._draw = draw

    def push(self, item: Item) -> Iterator[Item]:
        """Put an item in, and yield the one that comes out, if the buffer is full."""
        self.waiting.append(item)
        if len(self.waiting) >= self.size:
            yield self.pop()

    def pop(self) -> Item:
        """Return a random item of those that wait."""
        # Only random() draws the same numbers in every version of Python.
        chosen = int(self._draw.random() * len(self.waiting))
        self.waiting[chosen], self.waiting[-1] = self.waiting[-1], self.waiting[chosen]
        return self.waiting.pop()


class Lane(Generic[Item]):
    """The samples of one lane, epoch after epoch: every sample of an epoch comes once before the next epoch.

    Args:
        read: yields the usable samples of a shard.
        counts: shard -> usable samples, of the shards that are known; ``read`` may add to it.
        ahead: how many later samples :meth:`at` returns too.
    """

    def __init__(
        self,
        plan: LanePlan,
        lane: int,
        read: Callable[[int], Iterable[Item]],
        counts: Mapping[int, int],
        ahead: int = 0,
    ) -> None:
        self.plan = plan
        self.lane = lane
        self.read = read
        self.counts = counts
        self.ahead = ahead
        self._samples: Iterator[Item] | None = None
        self._next = 0  # number of the first sample of `_window`
        self._window: deque[Item] = deque()

    def at(self, number: int) -> tuple[Item, ...]:
        """Return the lane's sample ``number`` and the ``ahead`` samples after it. Numbers only rise."""
        if self._samples is None:
            self._samples, self._next = self.samples(number), number
        while self._next < number:
            if self._window:
                self._window.popleft()
            else:
                next(self._samples)
            self._next += 1
        while len(self._window) <= self.ahead:
            self._window.append(next(self._samples))
        return tuple(self._window)

    def samples(self, first: int) -> Iterator[Item]:
        """Yield the lane's samples from number ``first`` on, without an end.

        Epochs and shards that lie before ``first`` are not read where their counts are known.

        Raises:
            UserError: no shard has a usable sample.
        """
        epoch = begin = empty = 0
        while empty < EMPTY_EPOCHS:
            total = self._total(epoch)
            if total is None or begin + total > first:
                total = yield from self._epoch(epoch, max(0, first - begin))
            empty = 0 if total else empty + 1
            begin += total
            epoch += 1
        raise UserError("data.path: no sample can be used; `flash-diffusion data check` says why")

    def _total(self, epoch: int) -> int | None:
        """Return the lane's samples of an epoch, None where a shard's count is unknown."""
        counts = [self.counts.get(shard) for shard in self.plan.dealt(self.lane, epoch)]
        return None if None in counts else sum(count for count in counts if count is not None)

    def _epoch(self, epoch: int, skip: int) -> Generator[Item, None, int]:
        """Yield the samples of an epoch but the first ``skip``; return the number of all."""
        shards = self.plan.dealt(self.lane, epoch)
        passed = self._passed(shards, epoch, skip)
        shuffle: Shuffle[Item | None] = self.plan.shuffle(self.lane, epoch)
        place = 0

        def drawn() -> Iterator[Item | None]:
            for number, shard in enumerate(shards):
                for sample in repeat(None, self.counts[shard]) if number < passed else self.read(shard):
                    yield from shuffle.push(sample)
            while shuffle.waiting:
                yield shuffle.pop()

        for sample in drawn():
            place += 1
            if place > skip and sample is not None:  # None only where a shard has changed since it was counted
                yield sample
        return place

    def _passed(self, shards: tuple[int, ...], epoch: int, skip: int) -> int:
        """Return how many of the first shards have given all their samples after ``skip`` samples of the epoch."""
        shuffle: Shuffle[int] = self.plan.shuffle(self.lane, epoch)
        for number, shard in enumerate(shards):
            if shard not in self.counts:
                return min([*shuffle.waiting, number])
            for _ in range(self.counts[shard]):
                if skip == 0:
                    return min([*shuffle.waiting, number])
                skip -= sum(1 for _ in shuffle.push(number))
        for _ in range(min(skip, len(shuffle.waiting))):
            shuffle.pop()
        return min(shuffle.waiting, default=len(shards))
