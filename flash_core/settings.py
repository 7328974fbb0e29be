"""The settings of a distillation: the constants of the method and the phases of the curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from .losses import AdversarialLoss
from .solvers import Solver


@dataclass(frozen=True)
class Phase:
    """One phase of training: the distribution of timesteps and the weight of each loss term.

    Attributes:
        modes: the weights beta of the modes of the timesteps, from pure noise on.
        adversarial, dmd, distillation: the weights lambda of the loss terms; a term of weight 0 is not computed.
    """

    modes: tuple[float, ...]
    adversarial: float = 0.0
    dmd: float = 0.0
    distillation: float = 1.0


# The published curriculum (arXiv 2406.02347, table of section 5): weight moves toward pure noise.
PUBLISHED_PHASES = (
    Phase(modes=(0.0, 0.0, 0.5, 0.5)),
    Phase(modes=(0.1, 0.3, 0.3, 0.3), adversarial=0.1, dmd=0.3),
    Phase(modes=(0.25, 0.25, 0.25, 0.25), adversarial=0.2, dmd=0.5),
    Phase(modes=(0.4, 0.2, 0.2, 0.2), adversarial=0.3, dmd=0.7),
)

DistillationLoss: TypeAlias = Literal["mse", "l1", "pseudo_huber", "lpips"]


@dataclass(frozen=True)
class DistillerSettings:
    """The constants of the method. Defaults: the paper's for SD 1.5.

    Attributes:
        teacher_steps: K, the number of timesteps of the teacher's grid.
        solver: the teacher's ODE solver; flow models take ``euler``.
        guidance: (low, high) of the uniform guidance scale, ``uncond + w (cond - uncond)``.
        distillation: the distance of student and teacher; ``lpips`` needs ``decode`` and ``perceptual``.
        perceptual_crop: window of the perceptual distance in latent pixels.
        adversarial: the adversarial loss.
        real: what the discriminator calls real: the data, or the teacher's solutions.
        r1: weight of the gradient penalty on the discriminator at real features; 0 is off.
        fake_score: the model of the student's distribution: the student itself (paper) or a critic adapter (DMD2).
    """

    teacher_steps: int = 32
    solver: Solver = "dpmpp_2m"
    guidance: tuple[float, float] = (3.0, 13.0)
    distillation: DistillationLoss = "mse"
    perceptual_crop: int = 32
    adversarial: AdversarialLoss = "lsgan"
    real: Literal["data", "teacher"] = "teacher"
    r1: float = 0.0
    fake_score: Literal["student", "critic"] = "student"
