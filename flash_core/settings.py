"""The settings of a distillation: the constants of the method and the phases of the curriculum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from .losses import AdversarialLoss
from .solvers import Solver


@dataclass(frozen=True)
class Phase:
    """One phase of training: the distribution of timesteps and the weight of each loss term.

    Attributes:
        modes: the weights beta of the modes of the timesteps, from pure noise on.
        adversarial, dmd, distillation, feature_matching, intra_segment: the weights lambda of the loss terms; a term of
            weight 0 is not computed.
        first_step_distillation: factor of the distillation loss of the samples that start at pure noise.
    """

    modes: tuple[float, ...]
    adversarial: float = 0.0
    dmd: float = 0.0
    distillation: float = 1.0
    feature_matching: float = 0.0
    intra_segment: float = 0.0
    first_step_distillation: float = 1.0


# The published curriculum (arXiv 2406.02347, table of section 5): weight moves toward pure noise.
PUBLISHED_PHASES = (
    Phase(modes=(0.0, 0.0, 0.5, 0.5)),
    Phase(modes=(0.1, 0.3, 0.3, 0.3), adversarial=0.1, dmd=0.3),
    Phase(modes=(0.25, 0.25, 0.25, 0.25), adversarial=0.2, dmd=0.5),
    Phase(modes=(0.4, 0.2, 0.2, 0.2), adversarial=0.3, dmd=0.7),
)

DistillationLoss: TypeAlias = Literal["mse", "l1", "pseudo_huber", "lpips"]
Rows: TypeAlias = Literal["all", "first_step"]
Weighting: TypeAlias = Literal["uniform", "min_snr", "velocity"]
FakeScore: TypeAlias = Literal["student", "critic"]

# t' of the adversarial term (arXiv 2406.02347, section 4.3); a shifted flow schedule takes the same fractions.
ADVERSARIAL_TIMESTEPS = (10, 250, 500, 750)
# Low noise, at which features still tell a sharp sample from a blurred one.
FEATURE_TIMESTEPS = (10, 100, 250)


@dataclass(frozen=True)
class StartStates:
    """Where the samples of a batch start that do not start at pure noise; the rest are noised data (the paper).

    Attributes:
        trajectory: share that starts on the guided teacher's own path from noise.
        student: share that starts at the student's own state after its first steps from noise (backward simulation).
        stochasticity: share of fresh noise between the student's steps.
        steps: step counts of the student's runs. The largest one has the segments of TDM and intra-segment guidance.
    """

    trajectory: float = 0.0
    student: float = 0.0
    stochasticity: float = 1.0
    steps: tuple[int, ...] = (2, 4)


@dataclass(frozen=True)
class DmdSettings:
    """The constants of distribution matching. Defaults: the paper's.

    Attributes:
        form: ``plain`` matches the guided real score; ``decoupled`` matches the unguided one, and adds the guidance at
            a noise level of its own, cleaner than the sample's start (arXiv 2511.22677); ``trajectory`` compares the
            distributions at the end of the sample's step, not at the clean end (TDM, arXiv 2503.06674).
        loss: how the difference of the scores becomes a gradient: in proportion (``mse``), or nearly its sign.
        rows: the samples on which the term acts: all, or those that start at pure noise or beside it.
        guidance: the guidance scale w of the real score, 1 for unguided; None for each sample's own.
        timesteps: lowest and highest noise level of re-noising, as uniform time in 0..999; None for 0..999, and for
            other forms than ``plain`` 20..979.
    """

    form: Literal["plain", "decoupled", "trajectory"] = "plain"
    loss: Literal["mse", "pseudo_huber"] = "mse"
    rows: Rows = "all"
    guidance: float | None = None
    timesteps: tuple[int, int] | None = None


@dataclass(frozen=True)
class DistillerSettings:
    """The constants of the method. Defaults: the paper's for SD 1.5.

    Attributes:
        teacher_steps: K, the number of timesteps of the teacher's grid.
        solver: the teacher's ODE solver; flow models take ``euler``.
        guidance: (low, high) of the uniform guidance scale, ``uncond + w (cond - uncond)``.
        guidance_interval: lowest and highest noise level at which the teacher is guided, as uniform time in 0..999;
            None for all.
        distillation: the distance of student and teacher; ``lpips`` needs ``decode`` and ``perceptual``.
        distillation_weighting: factor of a sample's distance by its timestep: ``uniform`` is 1, ``min_snr`` is
            min(SNR, 5) (arXiv 2303.09556 in z0), ``velocity`` is 1 / sigma^2, the distance of velocities.
        perceptual_crop: window of the perceptual distance in latent pixels.
        feature_timesteps: noise levels of feature matching, as uniform time in 0..999.
        feature_rows: the samples on which feature matching acts.
        adversarial: the adversarial loss.
        real: what the discriminator calls real: the data, or the teacher's solutions.
        r1: weight of the gradient penalty on the discriminator at real features; 0 is off.
        fake_score: the model of the student's distribution: the student itself (paper) or a critic adapter (DMD2).
        adversarial_timesteps: t', the noise levels of the adversarial term, as uniform time in 0..999.
        adversarial_rows: the samples on which the adversarial term acts.
        adversarial_weighting: ``fixed``: the phase's factor multiplies the loss. ``gradient_norm``: the term's gradient
            in the student's output has the phase's factor times the norm of the distillation term's gradient.
        dmd: the constants of distribution matching.
        states: where samples start.
    """

    teacher_steps: int = 32
    solver: Solver = "dpmpp_2m"
    guidance: tuple[float, float] = (3.0, 13.0)
    guidance_interval: tuple[int, int] | None = None
    distillation: DistillationLoss = "mse"
    perceptual_crop: int = 32
    adversarial: AdversarialLoss = "lsgan"
    real: Literal["data", "teacher"] = "teacher"
    r1: float = 0.0
    fake_score: FakeScore = "student"
    adversarial_timesteps: tuple[int, ...] = ADVERSARIAL_TIMESTEPS
    adversarial_rows: Rows = "all"
    adversarial_weighting: Literal["fixed", "gradient_norm"] = "fixed"
    dmd: DmdSettings = field(default_factory=DmdSettings)
    states: StartStates = field(default_factory=StartStates)
    distillation_weighting: Weighting = "uniform"
    feature_timesteps: tuple[int, ...] = FEATURE_TIMESTEPS
    feature_rows: Rows = "all"

    def reads_solution(self, phase: Phase) -> bool:
        """Return whether a term of ``phase`` reads the teacher's solution; if none does, it need not be computed."""
        return (
            phase.distillation > 0 or phase.feature_matching > 0 or (phase.adversarial > 0 and self.real == "teacher")
        )
