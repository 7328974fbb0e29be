"""Distances between two sets of pictures, and the diversity of a set, from features.

Inputs are features ``(N, D)`` of any network. Distances are computed in float64 and returned as floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features (arXiv 1706.08500, eq. 6).

    ``|m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2))``, covariances with N - 1. Its bias is positive and falls with N:
    compare only sets of one size with one reference, and with the distance of an independent set of the teacher.

    Args:
        features, reference: (N, D) and (M, D), N and M at least 2.
    """
    import torch

    check_features(features, reference)
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


def paired_distance(features: Tensor, reference: Tensor) -> float:
    """Return the mean Euclidean distance between row i of both sets: same prompt, same initial noise.

    Args:
        features, reference: (N, D) both.
    """
    check_features(features, reference)
    if len(features) != len(reference):
        raise ValueError(
            f"pairs need two sets of one size, got {len(features)} and {len(reference)} samples; generate both from "
            "the same prompts and seeds"
        )
    return float((features.double() - reference.double()).norm(dim=1).mean())


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


def check_features(features: Tensor, reference: Tensor) -> None:
    """Raise unless both are (at least 2, D) with one D, all finite."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D) from one feature network, got {tuple(features.shape)} and "
            f"{tuple(reference.shape)}"
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"a distance needs at least 2 samples per set, got {len(features)} and {len(reference)}")
    for name, values in (("features", features), ("reference", reference)):
        check_finite(values, name)


def check_finite(values: Tensor, name: str) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} hold NaN or infinity: the model that made these pictures has diverged")
