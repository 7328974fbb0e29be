"""Distances between sets of pictures, prompt accuracy and diversity, from features.

Inputs are embeddings ``(N, D)`` and class indices ``(N,)`` of one feature network. Distances are computed in float64
and returned as floats. Sets too large for memory are summed up in :class:`Moments`, enough for a Fréchet distance.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

KID_PARTS = 50  # random parts of the larger set, where the sets differ in size
KID_SEED = 0  # of the parts


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features (arXiv 1706.08500, eq. 6).

    ``|m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2))``, covariances with N - 1. Its bias is positive and falls with N:
    compare only sets of one size with one reference, and with the distance of an independent set of the teacher.

    Args:
        features, reference: (N, D) and (M, D), N and M at least 2.
    """
    import torch

    _check(features, reference)
    roots, means, traces = [], [], []
    for values in (features.double(), reference.double()):
        mean = values.mean(0)
        root = torch.linalg.qr((values - mean) / (len(values) - 1) ** 0.5, mode="r").R  # R^T R is the covariance
        roots.append(root)
        means.append(mean)
        traces.append(root.square().sum())
    # The eigenvalues of C C_r are the squares of these singular values: much quicker than the root of a matrix.
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(float((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * cross), 0.0)


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
        _check_finite(features, "features")
        values = features.double()
        return cls(len(values), values.sum(0), values.T @ values)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets together."""
        return Moments(self.count + other.count, self.sum + other.sum, self.products + other.products)

    def distance(self, reference: Moments) -> float:
        """Return the Fréchet distance, see :func:`frechet_distance`. The time grows with D^3, not with N.

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

    _check(features, reference)
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


def paired_distance(features: Tensor, reference: Tensor) -> float:
    """Return the mean Euclidean distance between row i of both sets: same prompt, same initial noise.

    Args:
        features, reference: (N, D) both.
    """
    _check(features, reference)
    if len(features) != len(reference):
        raise ValueError(
            f"pairs need two sets of one size, got {len(features)} and {len(reference)} samples; generate both from "
            "the same prompts and seeds"
        )
    return float((features.double() - reference.double()).norm(dim=1).mean())


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


def diversity(features: Tensor, prompts: Sequence[str]) -> float | None:
    """Return the mean Euclidean distance between all pairs of pictures that share a prompt.

    Each prompt counts once, whatever the number of its pictures. A model that always draws the same picture scores 0.

    Args:
        features: (N, D).
        prompts: the prompt of each picture.

    Returns:
        None where no prompt has two pictures.
    """
    spreads = diversity_by_prompt(features, prompts)
    return float(spreads.mean()) if len(spreads) else None


def diversity_by_prompt(features: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return for each prompt of two pictures or more the mean distance between its pictures: (P,) float64."""
    import torch

    if len(features) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts for {len(features)} pictures; give one prompt per picture")
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    spreads = [torch.pdist(features[index].double()).mean() for index in rows.values() if len(index) > 1]
    return torch.stack(spreads) if spreads else torch.empty(0, dtype=torch.float64)


def _check(features: Tensor, reference: Tensor) -> None:
    """Raise unless both are (at least 2, D) with one D, all finite."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D) from one feature network, got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}"
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"a distance needs at least 2 samples per set, got {len(features)} and {len(reference)}")
    for name, values in (("features", features), ("reference", reference)):
        _check_finite(values, name)


def _check_finite(values: Tensor, name: str) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} hold NaN or infinity: the model that made these pictures has diverged")


def _precomputed(dimensions: int) -> nn.Module:
    """Return an identity in place of torchmetrics' Inception: the inputs are already features."""
    from torch import nn

    class Precomputed(nn.Identity):
        num_features = dimensions

    return Precomputed()
