"""Measure single pictures against their conditions: (B,) numbers from pictures (B, 3, H, W) in [0, 1].

NaN says that a number means nothing for a picture, such as the seam of a mask that covers everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_LIMIT = 100.0  # dB, of pictures that are equal
SEAM_BAND = 3  # pixels on either side of a mask's border that count as near it
# Added to the differences on both sides of a seam's ratio, of a range of [0, 1]: about what the eye notices, so that
# the autoencoder's rounding on a plain ground does not count as a seam.
SEAM_FLOOR = 4 / 255
EDGE_TOLERANCE = 2  # pixels, between an edge that is asked for and the one that is there


def psnr(made: Tensor, wanted: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, at most ``PSNR_LIMIT``.

    Args:
        counts: (B, 1, H, W), 1 where pixels count; the result is NaN if no pixel counts.
    """
    squares = (made.double() - wanted.double()).square().mean(1, keepdim=True)
    weight = torch.ones_like(squares) if counts is None else counts.double()
    mean = (squares * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return -10 * mean.clamp(min=10 ** (-PSNR_LIMIT / 10)).log10()


def seam(made: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Return the colour step across the mask's border relative to the original near the border; 1 = no seam.

    ``(a + f) / (b + f)``: ``a`` is the mean difference of neighbouring pixels across the border in the finished
    picture, ``b`` the mean difference of neighbouring pixels near the border in the original, ``f`` is ``SEAM_FLOOR``.

    Args:
        mask: (B, 1, H, W), 1 where the model painted; the result is NaN for a mask without a border.
    """
    inside = (mask >= 0.5).float()
    size = 2 * SEAM_BAND + 1
    near = F.max_pool2d(inside, size, 1, SEAM_BAND) - (1 - F.max_pool2d(1 - inside, size, 1, SEAM_BAND))
    across, nearby = [], []
    for axis in (2, 3):
        crosses = inside.diff(dim=axis).abs()[:, 0]
        length = inside.shape[axis] - 1
        close = (near.narrow(axis, 0, length) * near.narrow(axis, 1, length))[:, 0]
        across.append((made.diff(dim=axis).abs().mean(1), crosses))
        nearby.append((original.diff(dim=axis).abs().mean(1), close))

    def mean(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        total = sum((step * weight).sum((1, 2)) for step, weight in parts)
        count = sum(weight.sum((1, 2)) for _, weight in parts)
        return torch.as_tensor(total / count)

    return ((mean(across) + SEAM_FLOOR) / (mean(nearby) + SEAM_FLOOR)).double()


def edge_agreement(found: Tensor, wanted: Tensor, tolerance: int = EDGE_TOLERANCE) -> dict[str, Tensor]:
    """Return precision, recall and F1, in 0..1, of the found edges against the wanted edges.

    An edge pixel agrees if the other picture has an edge at most ``tolerance`` pixels away, across, down or both.

    Args:
        found, wanted: (B, 1, H, W), above 0.5 on edges. Precision is 0 without found edges; all three are NaN without
            wanted edges.
    """
    found, wanted = (found > 0.5).float(), (wanted > 0.5).float()

    def share(edges: Tensor, other: Tensor) -> Tensor:
        reach = F.max_pool2d(other, 2 * tolerance + 1, 1, tolerance)
        return (edges * reach).sum((1, 2, 3)) / edges.sum((1, 2, 3)).clamp(min=1)

    nothing = wanted.sum((1, 2, 3)) == 0
    precision, recall = share(found, wanted), share(wanted, found)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    values = {"precision": precision, "recall": recall, "f1": f1}
    return {name: value.double().masked_fill(nothing, torch.nan) for name, value in values.items()}


def distance(features: Tensor, reference: Tensor) -> Tensor:
    """Return Euclidean distances between rows (B, D)."""
    distances: Tensor = (features.double() - reference.double()).norm(dim=1)
    return distances


def cosine(features: Tensor, reference: Tensor) -> Tensor:
    """Return cosines between rows (B, D), in -1..1."""
    return F.cosine_similarity(features.double(), reference.double())


def reduced(images: Tensor, scale: int) -> Tensor:
    """Return pictures ``scale`` times smaller; each pixel is a mean."""
    return F.avg_pool2d(images, scale)
