"""The figures of a run beside the teacher: distances in three kinds of features with their intervals, and the rest.

A student is measured on one set of pictures per seed of noise: a figure is the mean over the sets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ....flash_core.measures import confidence_intervals as bootstrap
from ....flash_core.measures import half_samples
from ....flash_core.measures.confidence_intervals import Estimate
from ....flash_core.measures.distances import diversity, diversity_by_prompt, frechet_distance, paired_distance
from ....flash_core.measures.half_samples import Halves
from ....flash_core.measures.precision_recall import NEIGHBOURS, precision_recall
from ...metrics.distances import kernel_distance, prompt_accuracy
from .reference import FeatureSet, Reference

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("features", "states", "random")  # of features; the first is the feature network that --features names
SLOW_HALVES = 20  # of figures that take long
LOOKS = ("sharpness", "contrast")  # columns of ``FeatureSet.more["looks"]``


class Figures:
    """Measure runs against a reference.

    Args:
        floor_of: name of the run that scores the floor: the teacher's second set.
        prompts: of the pictures of every set.
        classes: for each picture the classes that its prompt names.
        scored: whether to measure the preference; a stored reference may hold scores that nobody asked for.
    """

    def __init__(
        self,
        reference: Reference,
        floor_of: str,
        prompts: Sequence[str],
        classes: Sequence[Collection[int]],
        *,
        scored: bool = False,
    ) -> None:
        self.scored = scored
        self.reference = reference
        self.prompts = prompts
        self.classes = classes
        self.count = len(prompts)
        self.halves = {kind: Halves(reference.first.kind(kind), self.count) for kind in KINDS}
        self.distances: dict[tuple[str, str], tuple[float, Tensor]] = {}  # of a run: its distance, those of the halves
        self.floor_of = floor_of
        self._distances(floor_of, [reference.second])

    def of(self, name: str, sets: Sequence[FeatureSet]) -> dict[str, Any]:
        """Return a run's figures, by name; ``intervals`` and ``seeds`` hold the intervals and the spread over sets."""
        self._distances(name, sets)
        first, second = self.reference.first.features, self.reference.second
        per_set: dict[str, list[float | None]] = {
            "fd": [frechet_distance(made.features, first) for made in sets],
            "kid": [kernel_distance(made.features, first) for made in sets],
            "paired": [paired_distance(sets[0].features, second.features)],
            "prompt_accuracy": [prompt_accuracy(made.predicted, self.classes) for made in sets],
            "diversity": [diversity(made.features, self.prompts) for made in sets],
            **self._coverage(sets),
            **{look: [self._look(made, column) for made in sets] for column, look in enumerate(LOOKS)},
        }
        if self.scored:
            per_set["preference"] = [float(made.more["preference"].mean()) for made in sets]
        values = {key: _mean(found) for key, found in per_set.items()}
        kinds = {kind: self._kind(name, kind) for kind in KINDS}
        spread = {
            key: deviation
            for key, found in per_set.items()
            if (deviation := bootstrap.deviation_over(found)) is not None
        }
        for kind in KINDS if len(sets) > 1 else ():
            floor = self.distances[self.floor_of, kind][0]
            spread[f"x_floor_{kind}"] = stdev(
                frechet_distance(m.kind(kind), self.reference.first.kind(kind)) / floor for m in sets
            )
        return {
            **values,
            "kinds": kinds,
            "intervals": {key: asdict(found) for key, found in self._intervals(values, sets).items()},
            "seeds": {"count": len(sets), "deviations": spread},
        }

    def difference(self, name: str, rival: str, kind: str) -> Estimate:
        """Return by how much a run's distance is below its rival's, with its interval; above 0 = the run is nearer."""
        (ours, our_halves), (theirs, their_halves) = self.distances[name, kind], self.distances[rival, kind]
        return half_samples.around(theirs - ours, their_halves - our_halves, self.count)

    def change(self, before: str, after: str, kind: str) -> Estimate:
        """Return the relative change of the distance from one run to another, with its interval."""
        (old, old_halves), (new, new_halves) = self.distances[before, kind], self.distances[after, kind]
        return half_samples.change(old, old_halves, new, new_halves, self.count)

    def _distances(self, name: str, sets: Sequence[FeatureSet]) -> None:
        for kind in KINDS:
            first = self.reference.first.kind(kind)
            values = [frechet_distance(made.kind(kind), first) for made in sets]
            halves = [self.halves[kind].distances(made.kind(kind)) for made in sets]
            self.distances[name, kind] = half_samples.mean(values, halves)

    def _kind(self, name: str, kind: str) -> dict[str, Any]:
        """Return distance and distance / floor in a kind of features."""
        value, halves = self.distances[name, kind]
        floor, floor_halves = self.distances[self.floor_of, kind]
        times = (
            Estimate(1.0, 1.0, 1.0, self.count)
            if name == self.floor_of
            else half_samples.ratio(value, halves, floor, floor_halves, self.count)
        )
        found = half_samples.around(value, halves, self.count)
        low = max(found.low or 0.0, 0.0)  # no distance is below 0
        return {"fd": asdict(replace(found, low=low)), "x_floor": asdict(times)}

    def _coverage(self, sets: Sequence[FeatureSet]) -> dict[str, list[float | None]]:
        """Return precision and recall; None where a set is too small for neighbours."""
        if self.count <= NEIGHBOURS:
            return {"precision": [None], "recall": [None]}
        found = [precision_recall(made.features, self.reference.first.features) for made in sets]
        return {"precision": [each[0] for each in found], "recall": [each[1] for each in found]}

    def _look(self, made: FeatureSet, column: int) -> float:
        """Return the mean of a look over the teacher's; 1 = as sharp, as rich in contrast."""
        return float(made.more["looks"][:, column].mean() / self.reference.second.more["looks"][:, column].mean())

    def _intervals(self, values: dict[str, float | None], sets: Sequence[FeatureSet]) -> dict[str, Estimate]:
        """Return the intervals of the figures beside the Fréchet distances; of several sets, those of their mean."""
        import torch

        second, first = self.reference.second, self.reference.first.features

        def mean(value: Callable[[FeatureSet], Tensor]) -> Tensor:
            return torch.stack([value(made) for made in sets]).mean(0)

        kid = mean(lambda made: self.halves["features"].kernel_distances(made.features, first))
        found = {
            "kid": half_samples.around(values["kid"] or 0.0, kid, self.count),
            "paired": bootstrap.mean_of((sets[0].features.double() - second.features.double()).norm(dim=1)),
            "diversity": bootstrap.mean_of(mean(lambda made: diversity_by_prompt(made.features, self.prompts))),
        }
        if values["prompt_accuracy"] is not None:
            pairs = [pair for made in sets for pair in zip(made.predicted.tolist(), self.classes, strict=True)]
            known = [guess in fitting for guess, fitting in pairs if fitting]
            found["prompt_accuracy"] = bootstrap.share_of(sum(known), len(known))
        for column, look in enumerate(LOOKS):
            ours = mean(lambda made, at=column: made.more["looks"][:, at])  # type: ignore[misc]
            found[look] = bootstrap.ratio_of_means(ours, second.more["looks"][:, column])
        if self.scored:
            found["preference"] = bootstrap.mean_of(mean(lambda made: made.more["preference"]))
        if values["precision"] is not None and self.count // 2 > NEIGHBOURS:
            for place, key in enumerate(("precision", "recall")):
                found[key] = self._jackknife(
                    values[key],
                    lambda rows, all_rows, at=place: fmean(  # type: ignore[misc]
                        precision_recall(made.features[rows], first[all_rows])[at] for made in sets
                    ),
                )
        return found

    def _jackknife(self, value: float | None, measure: Callable[[Tensor, Tensor], float]) -> Estimate:
        """Return a figure of sets with its interval, from its values on halves of both sets."""
        import torch

        assert value is not None
        halves = self.halves["features"]
        pairs = zip(halves.rows[:SLOW_HALVES], halves.all_rows[:SLOW_HALVES], strict=True)
        values = [measure(rows, all_rows) for rows, all_rows in pairs]
        return half_samples.around(value, torch.tensor(values, dtype=torch.float64), self.count)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
