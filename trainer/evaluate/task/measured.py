"""The figures of a comparison on a task: of each set of samples, and their means over the sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ....flash_core.measures import confidence_intervals as bootstrap
from ...tasks.scores import distance
from .figures import OF_SETS, PAIRED
from .runs import YARDSTICK
from .sets import SetDistances

if TYPE_CHECKING:
    from torch import Tensor

    from ....flash_core.measures.confidence_intervals import Estimate
    from ...tasks.figures import Figure
    from .samples.sample_set import SampleSet


@dataclass(frozen=True)
class MeasuredSet:
    """What one set of samples gave. Its features are not kept, so memory does not grow with the number of sets.

    Attributes:
        distances: of the runs; None where there are too few samples for distances of sets.
        scores: {run's name: {figure's key: (N,)}}.
        seconds: {run's name: time of all its pictures}.
    """

    distances: SetDistances | None
    scores: Mapping[str, Mapping[str, Tensor]]
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, sample_set: SampleSet, names: Collection[str], many: str, compares_sets: bool) -> MeasuredSet:
        """Measure the answers of a set.

        Args:
            names: of the runs.
            many: name of the teacher's many steps.
            compares_sets: whether there are enough samples for distances of sets.
        """
        seen = sample_set.seen
        features = {name: seen[name].features() for name in names}
        distances = None
        if compares_sets:
            originals = features[YARDSTICK]["features"]
            distances = SetDistances.measured(features, sample_set.independent.features(), originals)
        scores = {
            name: {
                **{key: torch.cat(parts) for key, parts in seen[name].scores.items()},
                PAIRED.key: distance(features[name]["features"], features[many]["features"]),
            }
            for name in names
        }
        return cls(distances, scores, {name: seen[name].seconds for name in names})


class Measured:
    """Figures over sets of samples.

    Args:
        sets: at least one.
        figures: of the task.

    Attributes:
        figures: the measured ones: distances of sets where there are enough samples, the task's, the paired distance.
        mean: the mean distances of sets; None where there are too few samples.
    """

    def __init__(self, sets: Sequence[MeasuredSet], figures: Sequence[Figure]) -> None:
        self.sets = sets
        distances = [each.distances for each in sets if each.distances is not None]
        self.mean = SetDistances.mean(distances) if distances else None
        measured = sets[0].scores[YARDSTICK]
        of_sets = OF_SETS if self.mean is not None else ()
        self.figures = [*of_sets, *(figure for figure in figures if figure.key in measured), PAIRED]

    def estimates(self, name: str) -> dict[str, Estimate]:
        """Return a run's figures with their intervals."""
        return {figure.key: self._estimate(name, figure) for figure in self.figures}

    def difference(self, figure: Figure, name: str, rival: str) -> Estimate:
        """Return by how much a run is better than its rival on the same samples, with its interval."""
        if self.mean is not None and figure in OF_SETS:
            return self.mean.difference(name, rival, figure.key)
        sign = 1 if figure.higher_is_better else -1
        pairs = [(each.scores[name][figure.key], each.scores[rival][figure.key]) for each in self.sets]
        return bootstrap.mean_over_sets([sign * (ours - theirs) for ours, theirs in pairs])

    def spread(self, name: str) -> dict[str, Any]:
        """Return the number of sets, a run's figures in each set, and their standard deviations over the sets."""
        values = {figure.key: [self._value(each, name, figure) for each in self.sets] for figure in self.figures}
        deviations = {key: bootstrap.deviation_over(each) for key, each in values.items()}
        known = {key: deviation for key, deviation in deviations.items() if deviation is not None}
        return {"count": len(self.sets), "values": values, "deviations": known}

    def seconds(self, name: str) -> float:
        """Return the time of a run's pictures of one set, in the mean."""
        return fmean(each.seconds[name] for each in self.sets)

    def _estimate(self, name: str, figure: Figure) -> Estimate:
        if self.mean is not None and figure in OF_SETS:
            return self.mean.of(name, figure.key)
        return bootstrap.mean_over_sets([each.scores[name][figure.key] for each in self.sets])

    def _value(self, measured: MeasuredSet, name: str, figure: Figure) -> float | None:
        if measured.distances is not None and figure in OF_SETS:
            return measured.distances.found[name, figure.key][0]
        mean = float(measured.scores[name][figure.key].double().nanmean())
        return None if mean != mean else mean  # NaN where no sample counts
