"""What the inputs of a comparison on a task mean for its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...metrics.embedders import Features
    from .samples.subjects import Subjects


@dataclass(frozen=True)
class AboutTask:
    """What follows from a comparison's inputs.

    Attributes:
        has_targets: whether the project's targets apply: they were set for the demo's teacher on the demo's pictures.
        notes: sentences on the inputs that a reader must know.
    """

    has_targets: bool = True
    notes: tuple[str, ...] = ()


def about_task(features: Features, is_demo: bool, subjects: Subjects) -> AboutTask:
    """Return what the feature network, the teacher and the pictures mean for the report."""
    notes = []
    if features.of_demo and not subjects.of_demo:
        notes.append(
            f"All distances and cosines of features come from {features.title}, which has seen only the demo’s "
            "pictures. It is not meant for photographs: trust PSNR, seams, edges, LPIPS and the pictures, or give "
            "--features the weights file of FID’s Inception or the folder of a CLIP."
        )
    has_targets = is_demo and features.of_demo and subjects.of_demo
    if not has_targets:
        notes.append("There are no targets: the project’s targets were set for the demo’s teacher on its pictures.")
    return AboutTask(has_targets, tuple(notes))
