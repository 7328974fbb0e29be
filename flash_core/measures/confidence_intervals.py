"""Percentile intervals of the bootstrap (Efron 1979): how much a figure depends on the drawn samples.

Samples are drawn again with replacement, the same draws for all runs that are compared. The interval holds the middle
95 % of the figure's values. The draws have a fixed seed: the same values give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000  # of a mean
RESAMPLES_OF_SETS = 200  # of a distance between sets, which takes milliseconds
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval and its number of samples; None where there are no samples."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def mean_of(values: Tensor) -> Estimate:
    """Return the mean of values (N,) with its interval; NaN values don't count."""
    import torch

    values = values.double()[~values.isnan()]
    if not len(values):
        return Estimate(None, None, None, 0)
    generator = torch.Generator().manual_seed(SEED)
    index = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = _interval(values[index].mean(1))
    return Estimate(float(values.mean()), low, high, len(values))


def mean_over_sets(sets: Sequence[Tensor]) -> Estimate:
    """Return the mean over sets of their means, with its interval; NaN values don't count.

    Sets may share what their rows are about, such as pictures under other noise: a resampling draws the same rows of
    all sets, so rows that move together narrow no interval.

    Args:
        sets: values (N,) of each set.
    """
    import torch

    known = [values.double() for values in sets if not bool(values.isnan().all())]
    if len(known) < 2:
        return mean_of(known[0] if known else sets[0])
    generator = torch.Generator().manual_seed(SEED)
    index = torch.randint(len(known[0]), (RESAMPLES, len(known[0])), generator=generator)
    drawn = torch.stack([values[index].nanmean(1) for values in known]).nanmean(0)
    low, high = _interval(drawn)
    value = float(torch.stack([values.nanmean() for values in known]).mean())
    return Estimate(value, low, high, sum(int((~values.isnan()).sum()) for values in known))


def deviation_over(values: Sequence[float | None]) -> float | None:
    """Return a figure's standard deviation over sets; None of a single set, or where it was not measured."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 else None


def ratio_of_means(values: Tensor, others: Tensor) -> Estimate:
    """Return mean(values) / mean(others) of pairs (N,) with its interval; both are drawn together."""
    import torch

    values, others = values.double(), others.double()
    generator = torch.Generator().manual_seed(SEED)
    index = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    low, high = _interval(values[index].mean(1) / others[index].mean(1))
    return Estimate(float(values.mean() / others.mean()), low, high, len(values))


def share_of(hits: int, count: int) -> Estimate:
    """Return hits / count with Wilson's interval (1927), which has a width where all hit; the bootstrap's has none."""
    share, z = hits / count, 1.96  # of a normal distribution, 95 %
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5 / (1 + z**2 / count)
    return Estimate(share, max(middle - reach, 0.0), min(middle + reach, 1.0), count)


def set_values(measure: Callable[[Tensor], float], count: int) -> Tensor:
    """Return a figure of all N samples, then of each resampling: (1 + draws,).

    Subtract the values of two runs to get the values of their difference. A set drawn with replacement holds fewer
    different samples, which raises a Fréchet distance: differences between two runs keep their meaning, and the
    interval of a single distance lies a little high.

    Args:
        measure: returns the figure of the samples at an index (N,).
        count: N.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES_OF_SETS)]
    return torch.tensor([measure(index) for index in (torch.arange(count), *drawn)], dtype=torch.float64)


def of_set_values(values: Tensor, count: int) -> Estimate:
    """Return the figure of :func:`set_values`, or the difference of two figures, with its interval."""
    low, high = _interval(values[1:])
    return Estimate(float(values[0]), low, high, count)


def _interval(values: Tensor) -> tuple[float, float]:
    import torch

    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = values.quantile(tails).tolist()
    return low, high
