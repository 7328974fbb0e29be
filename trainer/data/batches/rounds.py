"""Which trajectories of a refreshed bank make each batch: a function of seed and batch number.

A bank of N trajectories with R uses each is visited in rounds. A round visits every trajectory of the bank once, in a
random order. Before each round N / R new trajectories join, and the oldest ones leave. So each trajectory is used in R
rounds, and a checkpoint needs to save nothing but the position. The first round has N / R trajectories only, so
training starts early; the bank is full in round R.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from ...seeds import stream


class Rounds:
    """The batches of one process. Every batch is of one frame (see :class:`~.order.Order`).

    What a round leaves of a frame, because it fills no batch, comes first in the frame's batches of the next rounds.

    Args:
        capacity: N, the most trajectories of the bank.
        reuse: R, uses of each trajectory in the mean, from 1 to N; exact where R is a whole number.
        batch: samples of a batch.
        purpose: of the random numbers, beside the seed: the process.
        frame_of: trajectory -> number of its frame; None if all have the same.
    """

    def __init__(
        self,
        capacity: int,
        reuse: float,
        batch: int,
        seed: int,
        *purpose: str | int,
        frame_of: Callable[[int], int] | None = None,
    ) -> None:
        if not 1 <= reuse <= capacity:
            raise ValueError(f"each of {capacity} trajectories can be used 1 to {capacity} times, not {reuse:g}")
        self.capacity = capacity
        self.reuse = reuse
        self._batch = batch
        self._seed = seed
        self._purpose = purpose
        self._frame_of = frame_of
        # Before each round: the visits of each frame, and the batches of all frames.
        self._visits: list[Counter[int]] = [Counter()]
        self._batches: list[int] = [0]
        self._permutations: dict[tuple[int, int], Tensor] = {}

    def window(self, number: int) -> range:
        """Return the trajectories of a round."""
        end = int((number + 1) * self.capacity / self.reuse)
        return range(max(0, end - self.capacity), end)

    def round_of(self, batch: int) -> int:
        """Return the round that a batch belongs to."""
        while self._batches[-1] <= batch:
            self._add_round()
        return bisect_right(self._batches, batch) - 1

    def made(self, batch: int) -> int:
        """Return how many trajectories must be there for a batch, counted from the first one of the run."""
        return self.window(self.round_of(batch)).stop

    def oldest(self, batch: int) -> int:
        """Return the oldest trajectory that this batch or a later one may have."""
        number = self.round_of(batch)
        waiting = [frame for frame, visits in self._visits[number].items() if visits % self._batch]
        left = [self._round_at(frame, self._first(frame, number)) for frame in waiting]
        return self.window(min([*left, number])).start

    def indices(self, batch: int) -> Tensor:
        """Return the trajectories of a batch, (B,), all of one frame."""
        number = self.round_of(batch)
        frames = self._frames(number)
        place = batch - self._batches[number]
        frame = frames[place]
        return self._visited(frame, self._first(frame, number) + frames[:place].count(frame) * self._batch)

    def _add_round(self) -> None:
        """Count the visits and the batches of one more round."""
        window, visits = self.window(len(self._visits) - 1), self._visits[-1].copy()
        if self._frame_of is None:
            visits[0] += len(window)
        else:
            visits.update(map(self._frame_of, window))
        self._visits.append(visits)
        self._batches.append(sum(count // self._batch for count in visits.values()))

    def _first(self, frame: int, number: int) -> int:
        """Return the first visit of a frame that the batches before a round leave."""
        return self._visits[number][frame] // self._batch * self._batch

    def _frames(self, number: int) -> list[int]:
        """Return the frame of each batch of a round."""
        before, after = self._visits[number : number + 2]
        frames = [
            frame for frame in sorted(after) for _ in range(after[frame] // self._batch - before[frame] // self._batch)
        ]
        if len(after) == 1:
            return frames
        order = torch.randperm(len(frames), generator=self._stream(number, "frames"))
        return [frames[place] for place in order.tolist()]

    def _round_at(self, frame: int, visit: int) -> int:
        """Return the round in which a visit of a frame is."""
        while self._visits[-1][frame] <= visit:
            self._add_round()
        return bisect_right(self._visits, visit, key=lambda visits: visits[frame]) - 1

    def _visited(self, frame: int, first: int) -> Tensor:
        """Return the trajectories of a batch's visits of a frame, from visit ``first`` on."""
        parts, count = [], self._batch
        while count:
            number = self._round_at(frame, first)
            begin = first - self._visits[number][frame]
            part = self._permutation(frame, number)[begin : begin + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return torch.cat(parts)

    def _permutation(self, frame: int, number: int) -> Tensor:
        """Return the trajectories of a frame in a round, in the round's order."""
        if (frame, number) not in self._permutations:
            for key in [key for key in self._permutations if key[0] == frame and key[1] < number - 1]:
                del self._permutations[key]
            window = self.window(number)
            own = [index for index in window if self._frame_of is None or self._frame_of(index) == frame]
            order = torch.randperm(len(own), generator=self._stream(number, frame))
            self._permutations[frame, number] = torch.tensor(own)[order]
        return self._permutations[frame, number]

    def _stream(self, number: int, what: str | int) -> torch.Generator:
        return stream(self._seed, "replay", *self._purpose, number, what)
