"""The figures of a run beside the teacher's pictures, from features that no loss has seen.

The trainer's ``evaluate`` has the same figures in the same features (``flash_core/measures``), for more pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...flash_core.measures import confidence_intervals as bootstrap
from ...flash_core.measures import half_samples
from ...flash_core.measures.confidence_intervals import Estimate
from ...flash_core.measures.distances import diversity, frechet_distance, paired_distance
from ...flash_core.measures.half_samples import Halves
from ...flash_core.measures.whitening import Whitening, usable_directions


@dataclass(frozen=True)
class PictureSet:
    """N pictures as numbers.

    Attributes:
        features: (N, D).
        sharpness, contrast: (N,).
    """

    features: Tensor
    sharpness: Tensor
    contrast: Tensor

    @classmethod
    def joined(cls, sets: Sequence[PictureSet]) -> PictureSet:
        """Return all pictures of some sets."""
        parts = ([made.features for made in sets], [made.sharpness for made in sets], [made.contrast for made in sets])
        return cls(*(torch.cat(part) for part in parts))


@dataclass(frozen=True)
class Row:
    """A run's figures; each is 1 for a perfect run, but ``likeness``, which is 0.

    Attributes:
        distance: Fréchet distance to the teacher's first set / that of the teacher's second set (the floor).
        likeness: distance of each picture to the teacher's from the same noise / to the teacher's from other noise.
        diversity: mean distance of the pictures that share a prompt / the teacher's.
        sharpness, contrast: their means / the teacher's.
    """

    distance: Estimate
    likeness: float
    diversity: float
    sharpness: Estimate
    contrast: Estimate


class Figures:
    """Measure sets of pictures against the teacher's.

    Args:
        twin: the teacher's pictures from the noise of all other runs.
        other: the teacher's pictures from other noise.
        prompts: a name of each picture's prompt.

    Raises:
        ValueError: a feature is NaN or infinite.
    """

    def __init__(self, twin: PictureSet, other: PictureSet, prompts: Sequence[str]) -> None:
        self.twin = twin
        self.prompts = prompts
        self.count = len(prompts)
        self.whitening = Whitening.of(other.features, usable_directions(self.count))
        self.other = self.whitening(other.features)
        self.same = self.whitening(twin.features)
        self.halves = Halves(self.other, self.count)
        self.floor = frechet_distance(self.same, self.other)
        self.floor_halves = self.halves.distances(self.same)
        self.other_noise = paired_distance(self.other, self.same)
        self.spread = diversity(self.same, prompts) or 0.0

    @property
    def directions(self) -> int:
        """Of the features that distances are measured in."""
        return int(self.whitening.axes.shape[0])

    def of(self, made: PictureSet) -> Row:
        """Return the figures of a run."""
        features = self.whitening(made.features)
        distance, halves = frechet_distance(features, self.other), self.halves.distances(features)
        return Row(
            half_samples.ratio(distance, halves, self.floor, self.floor_halves, self.count),
            paired_distance(features, self.same) / max(self.other_noise, half_samples.SMALLEST),
            (diversity(features, self.prompts) or 0.0) / max(self.spread, half_samples.SMALLEST),
            bootstrap.ratio_of_means(made.sharpness, self.twin.sharpness),
            bootstrap.ratio_of_means(made.contrast, self.twin.contrast),
        )

    def nearer(self, ours: PictureSet, theirs: PictureSet) -> Estimate:
        """Return by how much ``ours`` is nearer to the teacher than ``theirs``, in floors, with its interval."""
        values, halves = [], []
        for made in (theirs, ours):
            features = self.whitening(made.features)
            values.append(frechet_distance(features, self.other))
            halves.append(self.halves.distances(features))
        floor = max(self.floor, half_samples.SMALLEST)
        return half_samples.around((values[0] - values[1]) / floor, (halves[0] - halves[1]) / floor, self.count)
