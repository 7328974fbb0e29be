"""Random numbers of the terms, all from one generator, and the samples of a batch on which a term acts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..process import Process
from ..settings import Rows

FIRST_STEP_FRACTION = 0.9  # of the schedule: samples above it start at pure noise or beside it (t >= 900 of 999)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise shaped like ``like``, on its device."""
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like.device)


def integers(low: int, high: int, count: int, generator: torch.Generator) -> Tensor:
    """Return (count,) integers, uniform in ``low..high`` with both ends, on the generator's device."""
    return torch.randint(low, high + 1, (count,), generator=generator, device=generator.device)


def choices(values: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Return (count,) values, each drawn uniformly, on the generator's device."""
    drawn = integers(0, len(values) - 1, count, generator)
    return torch.tensor(values, device=drawn.device)[drawn]


def acting_rows(rows: Rows, process: Process, t: Tensor) -> Tensor | None:
    """Return the indices (b,) of the samples on which a term acts, None for all of them.

    Args:
        rows: ``all``, or ``first_step``: the samples that start in the noisiest tenth of the schedule.
        t: (B,) timesteps of the starts.
    """
    if rows == "all":
        return None
    first = [row for row, value in enumerate(t.tolist()) if process.fraction(value) > FIRST_STEP_FRACTION]
    return torch.tensor(first, dtype=torch.long, device=t.device)
