"""How far a student's pictures are from its teacher's in a few plain properties, as ratios: 1 is the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ....flash_core.measures.sharpness import contrast, luminance, sharpness

LAYOUT = 32  # px: pictures are reduced to it before they are compared with each other, so that grain is no diversity
FLAT = 1e-4  # a teacher with less of a property gives no ratio


def drift(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Return the student's luminance, saturation, contrast, sharpness and diversity, divided by the teacher's.

    Saturation is the largest minus the smallest of a pixel's three channels, in the mean. Diversity is the root mean
    square difference between two pictures of a set. It is left out for a single picture, and a property is left out
    where the teacher has (nearly) none of it.

    Args:
        student: (N, 3, H, W) in [0, 1], of the same prompts and noise as ``teacher``.
    """
    figures = {
        "luminance": lambda images: luminance(images).mean(),
        "saturation": lambda images: (images.amax(1) - images.amin(1)).mean(),
        "contrast": lambda images: contrast(images).mean(),
        "sharpness": lambda images: sharpness(images).mean().sqrt(),
        "diversity": diversity,
    }
    if len(teacher) == 1:
        del figures["diversity"]
    found = {name: (float(figure(student.float())), float(figure(teacher.float()))) for name, figure in figures.items()}
    return {name: ours / theirs for name, (ours, theirs) in found.items() if theirs > FLAT}


def diversity(images: Tensor) -> Tensor:
    """Return the root mean square difference between two pictures of a set (N, 3, H, W), N > 1, at low resolution."""
    small = F.interpolate(images, size=(LAYOUT, LAYOUT), mode="area").flatten(1)
    # The mean square difference over all pairs is twice the unbiased variance.
    return (2 * small.var(0, correction=1).mean()).sqrt()
