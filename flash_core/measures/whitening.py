"""Reduce features to a few whitened directions, so that a few hundred pictures suffice for a Fréchet distance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS = (
    64  # at most; a Fréchet distance of 64 numbers is usable from 192 pictures on (see :func:`usable_directions`)
)
LEAST_VARIANCE = 1e-4  # of the largest; smaller directions are mostly rounding


@dataclass(frozen=True)
class Whitening:
    """Principal component analysis with unit variances, fitted to one set.

    Attributes:
        mean: (D,).
        axes: (K, D), each direction divided by its standard deviation.
    """

    mean: Tensor
    axes: Tensor

    @classmethod
    def of(cls, features: Tensor, most: int = DIRECTIONS) -> Whitening:
        """Fit to features (N, D): the ``most`` directions of largest variance, fewer where the rest hardly varies."""
        import torch

        values = features.double()
        mean = values.mean(0)
        _, spread, directions = torch.linalg.svd(values - mean, full_matrices=False)
        deviations = spread / max(len(values) - 1, 1) ** 0.5
        count = int((deviations.square() > LEAST_VARIANCE * deviations[0].square()).sum())
        kept = max(1, min(count, most))
        # A set of equal pictures has no direction; 1 keeps its features finite.
        scale = deviations[:kept].where(deviations[:kept] > 0, 1.0)
        return cls(mean.float(), (directions[:kept] / scale[:, None]).float().contiguous())

    def __call__(self, features: Tensor) -> Tensor:
        """Return whitened features (N, K) of features (N, D)."""
        return (features.float() - self.mean) @ self.axes.T

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what a file stores."""
        return {f"{prefix}.mean": self.mean.contiguous(), f"{prefix}.axes": self.axes.contiguous()}

    @classmethod
    def stored(cls, tensors: Mapping[str, Tensor], prefix: str) -> Whitening:
        """Return the whitening of :meth:`tensors`."""
        return cls(tensors[f"{prefix}.mean"], tensors[f"{prefix}.axes"])


def usable_directions(samples: int, times: float = 1) -> int:
    """Return how many directions a Fréchet distance of few pictures may have: its bias is then 0.5 at most.

    The bias grows with the directions D and falls with both sets, as ``D (1 / N + 1 / M)``.

    Args:
        samples: N, of a run.
        times: M / N, samples of the set that runs are measured against for each sample of a run. Default: 1.
    """
    return max(1, min(DIRECTIONS, round(samples / (2 * (1 + 1 / times)))))
