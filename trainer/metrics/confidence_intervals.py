"""How far a figure would have moved had other samples been drawn: percentile intervals of the bootstrap.

Samples are drawn again with replacement, the same ones for everything that is compared, and the interval holds the
middle 95 % of what the figure then is (Efron 1979). The draws follow from a constant:
the same values, the same interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000  # of a mean
RESAMPLES_OF_SETS = 200  # of a distance between sets, which takes milliseconds
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and the number of samples it is of; nothing where there are none."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def mean_of(values: Tensor) -> Estimate:
    """The mean of values (N,); those that are NaN don't count."""
    import torch

    values = values.double()[~values.isnan()]
    if not len(values):
        return Estimate(None, None, None, 0)
    generator = torch.Generator().manual_seed(SEED)
    index = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = _interval(values[index].mean(1))
    return Estimate(float(values.mean()), low, high, len(values))


def set_values(measure: Callable[[Tensor], float], count: int) -> Tensor:
    """A figure of a whole set of N samples, and of as many drawn from it, again and again: (1 + draws,).

    Values of several runs go together entry by entry, so that :func:`of_set_values` takes their differences too. A set
    drawn with replacement holds fewer different samples, which raises a Fréchet distance: differences between two runs
    keep their meaning, and the interval of a single distance lies a little high.

    Args:
        measure: of the samples at an index (N,).
        count: N.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES_OF_SETS)]
    return torch.tensor([measure(index) for index in (torch.arange(count), *drawn)], dtype=torch.float64)


def of_set_values(values: Tensor, count: int) -> Estimate:
    """The figure that :func:`set_values` has drawn, or a difference of two, with its interval."""
    low, high = _interval(values[1:])
    return Estimate(float(values[0]), low, high, count)


def _interval(values: Tensor) -> tuple[float, float]:
    import torch

    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = values.quantile(tails).tolist()
    return low, high
