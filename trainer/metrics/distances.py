"""Distances of large sets, kernel distance and prompt accuracy; the other figures are in ``flash_core/measures``.

Inputs are embeddings ``(N, D)`` and class indices ``(N,)`` of one feature network. Distances are computed in float64
and returned as floats. Sets too large for memory are summed up in :class:`Moments`, enough for a Fréchet distance.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...flash_core.measures.distances import check_features, check_finite

if TYPE_CHECKING:
    from torch import Tensor, nn

KID_PARTS = 50  # random parts of the larger set, where the sets differ in size
KID_SEED = 0  # of the parts


@dataclass(frozen=True)
class Moments:
    """The sums that a Fréchet distance needs of a set of features: D^2 numbers for any number of samples.

    Attributes:
        count: N.
        sum: of the features, (D,) float64.
        products: sum of their outer products, (D, D) float64.
    """

    count: int
    sum: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of features (N, D).

        Raises:
            ValueError: a feature is NaN or infinite.
        """
        check_finite(features, "features")
        values = features.double()
        return cls(len(values), values.sum(0), values.T @ values)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets together."""
        return Moments(self.count + other.count, self.sum + other.sum, self.products + other.products)

    def distance(self, reference: Moments) -> float:
        """Return the Fréchet distance, see :func:`.frechet_distance`. The time grows with D^3, not with N.

        Raises:
            ValueError: a set has fewer than 2 samples.
        """
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance

        if min(self.count, reference.count) < 2:
            raise ValueError(f"a distance needs at least 2 samples per set, got {self.count} and {reference.count}")
        metric = FrechetInceptionDistance(feature=_precomputed(len(self.sum)))
        metric.orig_dtype = torch.float64  # of the result
        for kind, moments in (("fake", self), ("real", reference)):
            setattr(metric, f"{kind}_features_sum", moments.sum)
            setattr(metric, f"{kind}_features_cov_sum", moments.products)
            setattr(metric, f"{kind}_features_num_samples", torch.tensor(moments.count))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")  # before ``update``
            # Rounding can leave a distance of 0 a little below it.
            return max(float(metric.compute()), 0.0)


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Return KID, the squared maximum mean discrepancy with kernel ``(x.y / D + 1)^3`` (arXiv 1801.01401).

    Unbiased for independent sets of any size: two sets from one model scatter around 0, and a little below 0 where they
    show the same prompts. For sets of one size one estimate over all samples; for a larger reference the mean over
    random parts of the smaller set's size.

    Args:
        features, reference: (N, D) and (M, D), N and M at least 2.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    check_features(features, reference)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all extracted features")
        metric = KernelInceptionDistance(
            feature=_precomputed(features.shape[1]),
            subsets=1 if len(features) == len(reference) else KID_PARTS,
            subset_size=min(len(features), len(reference)),
        )
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # the metric draws its parts with the global generator
        torch.manual_seed(KID_SEED)
        return float(metric.compute()[0])


def prompt_accuracy(predicted: Tensor, wanted: Sequence[Collection[int]]) -> float | None:
    """Return the share of pictures, in 0..1, that are classified as a thing in their prompt.

    Args:
        predicted: (N,) class indices.
        wanted: for each picture the classes that fit its prompt: one for "red heart", several for "heart", no class
            where the classifier does not know the thing; such pictures do not count.

    Returns:
        None where no prompt names a known class.
    """
    if len(predicted) != len(wanted):
        raise ValueError(f"got {len(predicted)} predictions for {len(wanted)} pictures; give one class per picture")
    hits = [guess in fitting for guess, fitting in zip(predicted.tolist(), wanted, strict=True) if fitting]
    return sum(hits) / len(hits) if hits else None


def _precomputed(dimensions: int) -> nn.Module:
    """Return an identity in place of torchmetrics' Inception: the inputs are already features."""
    from torch import nn

    class Precomputed(nn.Identity):
        num_features = dimensions

    return Precomputed()
