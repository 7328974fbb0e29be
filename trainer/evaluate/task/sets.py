"""Distances between sets of a task's results, each with its values on random halves of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....flash_core.measures import half_samples
from ....flash_core.measures.confidence_intervals import Estimate
from ....flash_core.measures.distances import frechet_distance
from ....flash_core.measures.half_samples import Halves
from ....flash_core.measures.whitening import DIRECTIONS, Whitening
from .figures import FRECHET_ORIGINALS, KIND_OF

if TYPE_CHECKING:
    from torch import Tensor

Kinds = Mapping[str, "Tensor"]  # features (N, D) by their kind


@dataclass(frozen=True)
class SetDistances:
    """Fréchet distances of runs to the teacher's independent set, and to the originals.

    Attributes:
        found: of each run's name and figure's key the distance, and its values on random halves (H,).
        count: of samples.
    """

    found: Mapping[tuple[str, str], tuple[float, Tensor]]
    count: int

    @classmethod
    def measured(cls, runs: Mapping[str, Kinds], independent: Kinds, originals: Tensor) -> SetDistances:
        """Measure one set of samples.

        Args:
            runs: of each run its features.
            independent: features of the teacher's independent set.
            originals: features of the originals in the feature network.
        """
        count = len(originals)
        # Few samples get few directions, so that a distance in them is more than its own bias.
        most = max(1, min(DIRECTIONS, count // 4))
        reduce = {kind: Whitening.of(values, most) for kind, values in independent.items() if kind != "features"}
        references = {key: (kind, independent[kind]) for key, kind in KIND_OF.items()}
        references[FRECHET_ORIGINALS.key] = "features", originals
        found: dict[tuple[str, str], tuple[float, Tensor]] = {}
        for key, (kind, values) in references.items():
            reference = reduce[kind](values) if kind in reduce else values
            halves = Halves(reference, count)
            for name, made in runs.items():
                features = reduce[kind](made[kind]) if kind in reduce else made[kind]
                found[name, key] = frechet_distance(features, reference), halves.distances(features)
        return cls(found, count)

    @classmethod
    def mean(cls, sets: Sequence[SetDistances]) -> SetDistances:
        """Return the means over sets of samples, see :func:`half_samples.mean`."""
        found = {
            key: half_samples.mean([each.found[key][0] for each in sets], [each.found[key][1] for each in sets])
            for key in sets[0].found
        }
        return cls(found, sum(each.count for each in sets))

    def of(self, name: str, key: str) -> Estimate:
        """Return a run's distance with its interval."""
        found = half_samples.around(*self.found[name, key], self.count)
        return replace(found, low=max(found.low or 0.0, 0.0))  # no distance is below 0

    def change(self, before: str, after: str, key: str) -> Estimate:
        """Return the relative change of the distance from one run to another."""
        (old, old_halves), (new, new_halves) = self.found[before, key], self.found[after, key]
        return half_samples.change(old, old_halves, new, new_halves, self.count)

    def difference(self, name: str, rival: str, key: str) -> Estimate:
        """Return by how much a run's distance is below its rival's; above 0 = the run is nearer."""
        (ours, our_halves), (theirs, their_halves) = self.found[name, key], self.found[rival, key]
        return half_samples.around(theirs - ours, their_halves - our_halves, self.count)
