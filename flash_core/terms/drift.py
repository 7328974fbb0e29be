"""The student's outputs beside the teacher's, without a pass more: contrast and diversity of their latents."""

from __future__ import annotations

import torch
from torch import Tensor

from ..process import Process
from .draws import FIRST_STEP_FRACTION


@torch.no_grad()
def output_figures(process: Process, t: Tensor, z_student: Tensor, z_teacher: Tensor) -> dict[str, Tensor]:
    """Return sums (scalars on the device) of the student's and of the teacher's outputs, to be divided by each other.

    Contrast is the standard deviation inside each channel of each latent, in the mean. Diversity is the root mean
    square difference of neighbours in the batch where both start at pure noise: further down, the start itself says
    how a picture looks. A batch of one sample has no neighbours.

    Args:
        t: (B,) timesteps of the starts.
        z_student: (B, C, H, W).
        z_teacher: (B, C, H, W) the teacher's solutions from the same starts.

    Returns:
        ``student_contrast`` and ``teacher_contrast``; ``student_error``, the root mean square difference of the two
        roles; and for B > 1 ``student_diversity`` and ``teacher_diversity``, which are 0 where no two neighbours start
        at pure noise.
    """
    figures = {"student_error": (z_student.float() - z_teacher.float()).square().mean().sqrt()}
    first = (t > process.timestep(FIRST_STEP_FRACTION)).float()
    both = first * first.roll(1)
    for role, given in (("student", z_student), ("teacher", z_teacher)):
        z = given.float()
        figures[f"{role}_contrast"] = z.flatten(2).std(2, correction=0).mean()
        if len(z) > 1:
            distance = (z - z.roll(1, 0)).square().mean((1, 2, 3)).sqrt()
            figures[f"{role}_diversity"] = (both * distance).mean()
    return figures
