"""Random numbers of the terms, all from one generator, and the samples of a batch on which a term acts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..process import Process
from ..runs.transfer import sent
from ..settings import Rows
from .shared_batch import Random, shared

FIRST_STEP_FRACTION = 0.9  # of the schedule: samples above it start at pure noise or beside it (t >= 900 of 999)


def normal(like: Tensor, generator: Random) -> Tensor:
    """Return standard normal noise shaped like ``like``, on its device."""

    def draw(count: int, source: torch.Generator) -> Tensor:
        return torch.randn((count, *like.shape[1:]), generator=source, device=source.device)

    return sent(shared(generator, len(like)).draw(draw), like.device)


def uniform(count: int, generator: Random) -> Tensor:
    """Return (count,) numbers, uniform in [0, 1), on the generator's device."""
    return shared(generator, count).draw(
        lambda total, source: torch.rand(total, generator=source, device=source.device)
    )


def integers(low: int, high: int, count: int, generator: Random) -> Tensor:
    """Return (count,) integers, uniform in ``low..high`` with both ends, on the generator's device."""
    return shared(generator, count).draw(
        lambda total, source: torch.randint(low, high + 1, (total,), generator=source, device=source.device)
    )


def choices(values: Sequence[int], count: int, generator: Random) -> Tensor:
    """Return (count,) values, each drawn uniformly, on the generator's device."""
    drawn = integers(0, len(values) - 1, count, generator)
    return torch.tensor(values, device=drawn.device)[drawn]


def acting_rows(rows: Rows, process: Process, starts: Sequence[float]) -> Tensor | None:
    """Return the indices (b,) of the samples on which a term acts, on the CPU; None for all of them.

    Args:
        rows: ``all``, or ``first_step``: the samples that start in the noisiest tenth of the schedule.
        starts: the B timesteps at which the samples start.
    """
    if rows == "all":
        return None
    acting = [row for row, acts in enumerate(acts_on(rows, process, starts)) if acts]
    return torch.tensor(acting, dtype=torch.long)


def acts_on(rows: Rows, process: Process, starts: Sequence[float]) -> list[bool]:
    """Return for each sample whether a term acts on it.

    Args:
        rows: as for :func:`acting_rows`.
        starts: timesteps of the starts.
    """
    return [rows == "all" or process.fraction(value) > FIRST_STEP_FRACTION for value in starts]
