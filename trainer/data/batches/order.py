"""The order of the samples: a function of seed and position, so that a checkpoint saves only the position."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...seeds import stream
from ..encoding.examples import caption_at


@dataclass(frozen=True)
class Order:
    """A new random permutation of ``length`` samples every epoch, from (seed, epoch).

    A position counts samples from the start of training. A batch may continue into the next epoch.

    With several frames (aspect-ratio buckets) the samples of each frame have such an order of their own, and every
    batch is of one frame. Each epoch has as many batches of a frame as fit into its samples; what is left over comes
    first in the next epoch. So every sample of a frame comes once, before any comes again.

    Attributes:
        length: N.
        seed: of the permutations.
        frames: (N,) number of each sample's frame; None if all have the same.
        batch: samples of a batch, where there are several frames.
    """

    length: int
    seed: int
    frames: Tensor | None = None
    batch: int = 1

    def indices(self, position: int, count: int) -> Tensor:
        """Return the samples at ``position`` to ``position + count - 1``, (count,).

        Args:
            position: with several frames a multiple of ``batch``.
            count: with several frames at most ``batch``.
        """
        if len(self._members) == 1:
            return self._within(0, position, count)
        if position % self.batch or count > self.batch:
            raise ValueError(f"{count} samples at {position} are no batch of {self.batch}")
        frame, first = self._batch_at(position // self.batch)
        return self._within(frame, first, count)

    def captions(self, position: int, counts: Tensor, dropout: float) -> Tensor:
        """Return the number of each sample's caption, ``NO_CAPTION`` for the empty prompt, (B,).

        Args:
            position: of the first sample.
            counts: (B,) captions of each sample.
            dropout: share of empty prompts.
        """
        if dropout == 0 and bool((counts == 1).all()):
            return torch.zeros(len(counts), dtype=torch.long)
        numbers = enumerate(counts.tolist())
        return torch.tensor([caption_at(self.seed, position + row, count, dropout) for row, count in numbers])

    @cached_property
    def _members(self) -> list[Tensor]:
        """The samples of each frame that has any."""
        if self.frames is None:
            return [torch.arange(self.length)]
        return [(self.frames == frame).nonzero()[:, 0] for frame in self.frames.unique().tolist()]

    def _within(self, frame: int, position: int, count: int) -> Tensor:
        """Return ``count`` samples of a frame, from ``position`` in the frame's own order."""
        members = self._members[frame]
        parts = []
        while count > 0:
            epoch, offset = divmod(position, len(members))
            part = self._permutation(len(members), frame, epoch)[offset : offset + count]
            parts.append(members[part])
            position, count = position + len(part), count - len(part)
        return torch.cat(parts)

    def _batch_at(self, number: int) -> tuple[int, int]:
        """Return the frame of a batch, and the first of its samples in the frame's own order."""
        # A frame of n samples has floor(e n / batch) batches before epoch e.
        epoch = bisect_right(range(number * self.batch // self.length + 2 + len(self._members) * self.batch), number,
                             key=self._batches_before) - 1  # fmt: skip
        before = [epoch * len(members) // self.batch for members in self._members]
        after = [(epoch + 1) * len(members) // self.batch for members in self._members]
        frames = torch.cat(
            [torch.full((b - a,), frame) for frame, (a, b) in enumerate(zip(before, after, strict=True))]
        )
        frames = frames[self._permutation(len(frames), -1, epoch)]
        within = number - sum(before)
        frame = int(frames[within])
        return frame, (before[frame] + int((frames[:within] == frame).sum())) * self.batch

    def _batches_before(self, epoch: int) -> int:
        """Return the number of batches before an epoch."""
        return sum(epoch * len(members) // self.batch for members in self._members)

    def _permutation(self, length: int, frame: int, epoch: int) -> Tensor:
        """Return the order of ``length`` samples of a frame, or of the batches (frame -1), in an epoch."""
        kept = self._kept.get(frame)
        if kept is None or kept[0] != epoch:
            purpose = ("order", epoch) if frame == 0 else ("order", frame, epoch)
            kept = epoch, torch.randperm(length, generator=stream(self.seed, *purpose))
            self._kept[frame] = kept
        return kept[1]

    @cached_property
    def _kept(self) -> dict[int, tuple[int, Tensor]]:
        """Frame -> epoch and order; only the latest epoch, because a million samples take 8 MB."""
        return {}
