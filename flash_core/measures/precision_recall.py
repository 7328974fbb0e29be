"""Precision and recall of a set of pictures (Kynkäänniemi et al., arXiv 1904.06991).

The manifold of a set is the union of balls around its features, each as large as the distance to its k-th nearest
neighbour in the set. Precision falls when pictures look like none of the teacher's; recall falls when kinds of pictures
are missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = 3  # k of the paper's section 3


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Return (precision, recall), in 0..1.

    Args:
        features, reference: (N, D) and (M, D) of one network, more rows than ``neighbours``. Of a larger reference the
            first N rows are taken: the balls shrink with the size of a set.

    Raises:
        ValueError: a set is too small.
    """
    import torch

    reference = reference[: len(features)]
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} pictures a set, got {len(features)}")
    ours, theirs = features.double(), reference.double()
    between = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    our_radii, their_radii = _radii(ours, neighbours), _radii(theirs, neighbours)
    precision = (between <= their_radii).any(1).double().mean()
    recall = (between <= our_radii[:, None]).any(0).double().mean()
    return float(precision), float(recall)


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Return the distance (N,) of each row to its k-th nearest other row."""
    import torch

    within = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return within.kthvalue(neighbours + 1, dim=1).values  # the nearest row is the row itself
