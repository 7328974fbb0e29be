"""How far chance moves a Fréchet distance: the delete-half jackknife (Shao and Wu 1989, d = n / 2).

A bootstrap draws with replacement: a set of fewer different pictures has a larger Fréchet distance, so its interval
lies too high. Here a distance is measured again on random halves of the prompts, without replacement. The standard
deviation over the halves is that of the whole set; their bias, which is larger, is not used: the interval is put around
the distance of all pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .confidence_intervals import Estimate

if TYPE_CHECKING:
    from torch import Tensor

HALVES = 60  # the standard deviation is then known to 9 %
HALVES_OF_MANY = 20  # of more than ``MANY`` features, whose eigenvalues take long
MANY = 256
NORMAL = 1.96  # standard deviations, 95 %
SEED = 0
NUMBERS_AT_ONCE = 4_000_000  # in float64, 32 MB
SMALLEST = 1e-12  # a distance below is rounding


class Halves:
    """Random halves of a reference; the same halves for every run, so that runs can be compared.

    Args:
        reference: (N times, D); rows i, i + N, ... belong to the prompt of row i of a run.
        count: N.

    Attributes:
        rows: (H, N / 2), the rows of each half of a run.
        all_rows: (H, N times / 2), the rows of each half of the reference.
    """

    def __init__(self, reference: Tensor, count: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(SEED)
        draws = HALVES if reference.shape[1] <= MANY else HALVES_OF_MANY
        size = max(2, count // 2)
        self.rows = torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(draws)])
        self.all_rows = torch.cat([self.rows + start for start in range(0, len(reference), count)], 1)
        self.sides = []
        for rows in self._parts(self.all_rows, reference.shape[1]):
            mean, covariance = _moments(reference[rows])
            values, vectors = torch.linalg.eigh(covariance)
            root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
            self.sides.append((mean, _traces(covariance), root))

    def distances(self, features: Tensor) -> Tensor:
        """Return the Fréchet distance of each half of a run's features (N, D): (H,) float64."""
        import torch

        found = []
        parts = self._parts(self.rows, features.shape[1])
        for rows, (reference_mean, trace, root) in zip(parts, self.sides, strict=True):
            mean, covariance = _moments(features[rows])
            # tr (C C_r)^(1/2) = tr (R C R)^(1/2) with R = C_r^(1/2): symmetric, so its eigenvalues are real.
            shared = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum(1)
            found.append((mean - reference_mean).square().sum(1) + _traces(covariance) + trace - 2 * shared)
        return torch.cat(found).clamp(min=0)

    def _parts(self, rows: Tensor, dimensions: int) -> Sequence[Tensor]:
        """Split the halves into parts whose covariances fit into the memory."""
        at_once = max(1, NUMBERS_AT_ONCE // (dimensions * max(dimensions, self.all_rows.shape[1])))
        return [rows[start : start + at_once] for start in range(0, len(rows), at_once)]

    def kernel_distances(self, features: Tensor, reference: Tensor) -> Tensor:
        """Return KID (arXiv 1801.01401) of each half of a run and of its reference: (H,) float64.

        The exact unbiased estimate.
        """
        import torch

        ours, theirs = features.double(), reference.double()
        pairs = ((ours, ours), (theirs, theirs), (ours, theirs))
        inner, outer, between = ((one @ other.T / ours.shape[1] + 1) ** 3 for one, other in pairs)
        found = []
        for rows, all_rows in zip(self.rows, self.all_rows, strict=True):
            within = [
                (part.sum() - part.trace()) / (len(part) * (len(part) - 1))
                for part in (inner[rows][:, rows], outer[all_rows][:, all_rows])
            ]
            found.append(within[0] + within[1] - 2 * between[rows][:, all_rows].mean())
        return torch.stack(found)


def mean(values: Sequence[float], halves: Sequence[Tensor]) -> tuple[float, Tensor]:
    """Return the mean of a figure over sets, and the means of its values on the halves of each set (H,).

    All sets have the same rows in their halves. Where equal rows of two sets are about different things, the spread of
    the means falls with the square root of the number of sets; where they share a prompt or a picture, by less.
    """
    import torch

    return sum(values) / len(values), torch.stack(list(halves)).mean(0)


def around(value: float, values: Tensor, count: int) -> Estimate:
    """Return a figure with its interval: ``value`` plus and minus 1.96 standard deviations of its values on halves."""
    reach = NORMAL * float(values.std())
    return Estimate(value, value - reach, value + reach, count)


def ratio(value: float, values: Tensor, other: float, others: Tensor, count: int) -> Estimate:
    """Return ``value / other`` with its interval, by the delta method on logarithms, so that it stays above 0.

    Halves move both figures, each in its own proportion. The ratios of halves themselves would lie too near 1, since
    their larger bias is in both figures.
    """
    moved = (values - values.mean()) / max(value, SMALLEST) - (others - others.mean()) / max(other, SMALLEST)
    found, reach = value / max(other, SMALLEST), NORMAL * float(moved.std())
    return Estimate(found, found * math.exp(-reach), found * math.exp(reach), count)


def change(old: float, old_values: Tensor, new: float, new_values: Tensor, count: int) -> Estimate:
    """Return ``new / old - 1`` with its interval, by :func:`ratio`."""
    found = ratio(new, new_values, old, old_values, count)
    low, value, high = (None if part is None else part - 1 for part in (found.low, found.value, found.high))
    return Estimate(value, low, high, count)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return means (H, D) and covariances (H, D, D) of sets (H, N, D), in float64."""
    values = features.double()
    mean = values.mean(1)
    centred = values - mean[:, None]
    return mean, centred.mT @ centred / (values.shape[1] - 1)


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
