"""Choose a stochasticity from the students' distances to the teacher, by the rule of one standard error.

The smallest of several measured distances is often small by chance. So a value whose distance is within one standard
error of the smallest counts as close, and of the close values the nearest to the recipe's is taken (Breiman, Friedman,
Olshen, Stone 1984, section 3.4.3). The standard error is that of the difference, by the delete-half jackknife.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ....flash_core.measures import half_samples
from ....flash_core.measures.distances import frechet_distance
from ....flash_core.measures.half_samples import Halves


@dataclass(frozen=True)
class Choice:
    """The stochasticity of one step count.

    Attributes:
        steps: the step count.
        distances: {stochasticity: Fréchet distance to the teacher's set}.
        best: the stochasticity with the smallest distance.
        close: those within one standard error of the smallest distance; ``best`` is one of them.
        worse: those that are farther beyond chance: the 95 % interval of the difference lies above 0.
        taken: of ``close`` the nearest to the recipe's value; of two equally near ones that with the smaller distance.
    """

    steps: int
    distances: Mapping[float, float]
    best: float
    close: tuple[float, ...]
    worse: tuple[float, ...]
    taken: float


def choose(
    steps: int, students: Sequence[Mapping[float, Tensor]], references: Sequence[Tensor], preferred: float
) -> Choice:
    """Choose the stochasticity of a step count; distances are means over sets of samples.

    Args:
        students: of each set {stochasticity: features (N, D)}; row i has the same prompt and noise at every value.
        references: of each set the teacher's features (N times, D); rows i, i + N, ... belong to the prompt of row i.
        preferred: the recipe's stochasticity, which wins among the close ones.
    """
    count = len(next(iter(students[0].values())))
    distances, on_halves = _mean_distances(students, references, count)
    best = min(distances, key=distances.__getitem__)
    close, worse = [], []
    for share in distances:
        gap, gaps = distances[share] - distances[best], on_halves[share] - on_halves[best]
        if gap <= float(gaps.std()):
            close.append(share)
        if (half_samples.around(gap, gaps, count * len(students)).low or 0.0) > 0:
            worse.append(share)
    taken = min(close, key=lambda share: (abs(share - preferred), distances[share]))
    return Choice(steps, distances, best, tuple(close), tuple(worse), taken)


def _mean_distances(
    students: Sequence[Mapping[float, Tensor]], references: Sequence[Tensor], count: int
) -> tuple[dict[float, float], dict[float, Tensor]]:
    """Return the means over sets of each stochasticity's distance, and of its distances on halves (H,)."""
    values: dict[float, list[float]] = {share: [] for share in students[0]}
    on_halves: dict[float, list[Tensor]] = {share: [] for share in students[0]}
    halves = None
    for number, (made, reference) in enumerate(zip(students, references, strict=True)):
        if halves is None or reference is not references[number - 1]:  # sets of text-to-image share one reference
            halves = Halves(reference, count)
        for share, features in made.items():
            values[share].append(frechet_distance(features, reference))
            on_halves[share].append(halves.distances(features))
    means = {share: half_samples.mean(values[share], on_halves[share]) for share in values}
    return {share: mean for share, (mean, _) in means.items()}, {share: found for share, (_, found) in means.items()}
