"""Choose a stochasticity from the students' distances to the teacher: the best, or one that is even with the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...metrics import confidence_intervals as bootstrap
from ...metrics.distances import frechet_distance


@dataclass(frozen=True)
class Choice:
    """The stochasticity of one step count.

    Attributes:
        steps: the step count.
        distances: {stochasticity: Fréchet distance to the teacher's set}.
        best: the stochasticity with the smallest distance.
        even: those whose distance differs from the smallest by no more than chance: the 95 % interval of the
            difference, over resampled pictures, holds 0. ``best`` is one of them.
        taken: of ``even`` the nearest to the recipe's value; of two equally near ones that with the smaller distance.
    """

    steps: int
    distances: Mapping[float, float]
    best: float
    even: tuple[float, ...]
    taken: float


def choose(steps: int, students: Mapping[float, Tensor], reference: Tensor, preferred: float) -> Choice:
    """Choose the stochasticity of a step count.

    Args:
        students: {stochasticity: features (N, D)}; row i has the same prompt and noise in every set.
        reference: the teacher's features (N times, D); rows i, i + N, ... belong to the prompt of row i.
        preferred: the recipe's stochasticity, which wins where chance alone decides.
    """
    count = len(next(iter(students.values())))
    drawn = {
        share: bootstrap.set_values(lambda index, own=features: _distance(own, reference, index, count), count)  # type: ignore[misc]
        for share, features in students.items()
    }
    distances = {share: float(values[0]) for share, values in drawn.items()}
    best = min(distances, key=distances.__getitem__)
    even = [share for share in students if share == best or _is_even(drawn[share] - drawn[best], count)]
    taken = min(even, key=lambda share: (abs(share - preferred), distances[share]))
    return Choice(steps, distances, best, tuple(even), taken)


def _distance(features: Tensor, reference: Tensor, index: Tensor, count: int) -> float:
    """Return the distance of the pictures at an index to the teacher's pictures of the same prompts."""
    rows = torch.cat([index + start for start in range(0, len(reference), count)])
    return frechet_distance(features[index], reference[rows])


def _is_even(differences: Tensor, count: int) -> bool:
    low = bootstrap.of_set_values(differences, count).low
    return low is None or low <= 0
