"""Distribution matching distillation (DMD): the real score, the fake score, and the critic that learns the fake score.

Scores are written as clean predictions z0, from which they differ by a factor: R is the teacher's, F that of the
student's distribution. ``plain`` is arXiv 2311.18828 as arXiv 2406.02347 uses it; ``decoupled`` is arXiv 2511.22677;
``trajectory`` is TDM, arXiv 2503.06674.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Conditioning, Denoiser, guided_z0, predict_z0
from ..passes.asking import of_them_unconditional
from ..passes.guidance import guided_rows
from ..process import NUM_TIMESTEPS, broadcast
from ..rollout import Rollout
from ..settings import DistillerSettings
from .draws import integers, normal, uniform
from .segments import diffused_from_segment_end
from .shared_batch import Random

PLAIN_TIMESTEPS = (0, NUM_TIMESTEPS - 1)
INNER_TIMESTEPS = (20, 979)  # DMD2's range, the outer 2 % left out (arXiv 2405.14867, appendix)


def real_and_fake(
    denoiser: Denoiser, settings: DistillerSettings, z_student: Tensor, rollout: Rollout, generator: Random
) -> tuple[Tensor, Tensor]:
    """Return z0 of the real and of the fake score (B, C, H, W) at re-noised ``z_student``; call in the role teacher.

    ``plain``: both at one noise level, real = R(c) + (w - 1) (R(c) - R(empty)).
    ``decoupled``: the matching R(c) - F(c) at a level of its own, and the guidance (w - 1) (R(c) - R(empty)) at a level
    cleaner than the sample's start.
    ``trajectory``: as plain, at a state that is diffused on from the end of the sample's step.
    """
    low, high = bounds_of(settings)
    process, scale = denoiser.process, guidance_of(settings, rollout)
    with torch.no_grad():
        if settings.dmd.form == "trajectory":
            steps = max(settings.states.steps)
            z_t, drawn = diffused_from_segment_end(process, z_student, rollout, steps, (low, high), generator)
            t = drawn.to(z_student.device)
        else:
            drawn = process.uniform_timestep(integers(low, high, len(z_student), generator))
            t = drawn.to(z_student.device)
            z_t = process.add_noise(z_student, normal(z_student, generator), t)
        if settings.dmd.form == "decoupled":
            real = _decoupled(denoiser, z_student, z_t, t, rollout, scale, low, generator)
        else:
            rows = guided_rows(settings, process, drawn.tolist(), scales_of(settings))
            real = guided_z0(denoiser, z_t, t, rollout.conditioning, rollout.unconditional, scale, rows)
        with denoiser.role(settings.fake_score):
            fake = predict_z0(denoiser, z_t, t, rollout.conditioning)
    return real, fake


def bounds_of(settings: DistillerSettings) -> tuple[int, int]:
    """Return the lowest and the highest noise level of re-noising, in uniform time."""
    return settings.dmd.timesteps or (PLAIN_TIMESTEPS if settings.dmd.form == "plain" else INNER_TIMESTEPS)


def guidance_of(settings: DistillerSettings, rollout: Rollout) -> Tensor:
    """Return the guidance scale of the real score (B,): the settings', or each sample's own."""
    given = settings.dmd.guidance
    return rollout.guidance if given is None else torch.full_like(rollout.guidance, given)


def scales_of(settings: DistillerSettings) -> tuple[float, float]:
    """Return the lowest and the highest guidance scale of the real score."""
    given = settings.dmd.guidance
    return settings.guidance if given is None else (given, given)


def _decoupled(
    denoiser: Denoiser,
    z_student: Tensor,
    z_matching: Tensor,
    t_matching: Tensor,
    rollout: Rollout,
    scale: Tensor,
    low: int,
    generator: Random,
) -> Tensor:
    """Return R(z_DM, c) + (w - 1) (R(z_CA, c) - R(z_CA, empty)), the three predictions in one batch."""
    process = denoiser.process
    t = process.uniform_timestep(cleaner_times(denoiser, rollout.starts, low, generator).to(z_student.device))
    z_t = process.add_noise(z_student, normal(z_student, generator), t)
    with of_them_unconditional(len(z_t)):
        predicted = predict_z0(
            denoiser,
            torch.cat([z_matching, z_t, z_t]),
            torch.cat([t_matching, t, t]),
            Conditioning.cat([rollout.conditioning, rollout.conditioning, rollout.unconditional]),
        )
    real, with_condition, without = predicted.chunk(3)
    return real + broadcast(scale - 1, real) * (with_condition - without)


def cleaner_times(denoiser: Denoiser, starts: Sequence[float], low: int, generator: Random) -> Tensor:
    """Return uniform times (B,), uniform in ``low`` to just below each sample's start; ``low`` where none is."""
    share = uniform(len(starts), generator)
    fractions = [denoiser.process.fraction(value) for value in starts]
    room = torch.tensor([max(round(NUM_TIMESTEPS * value) - 1 - low, 1) for value in fractions], device=share.device)
    return low + (room * share).long()


def critic_loss(
    denoiser: Denoiser,
    settings: DistillerSettings,
    z_student: Tensor,
    conditioning: Conditioning,
    generator: Random,
    rollout: Rollout | None = None,
) -> Tensor:
    """Return the diffusion loss of the current role on the student's samples, at uniform timesteps.

    Args:
        rollout: for the form ``trajectory``, whose starts the samples have; the loss is then at the states and levels
            at which the term asks for the fake score.
    """
    process = denoiser.process
    if settings.dmd.form == "trajectory":
        if rollout is None:
            raise ValueError("the form 'trajectory' needs rollout=, the starts of the samples that the critic learns")
        steps = max(settings.states.steps)
        z_t, t = diffused_from_segment_end(process, z_student, rollout, steps, bounds_of(settings), generator)
        t = t.to(z_student.device)
        alpha, sigma = (broadcast(value, z_t) for value in process.alpha_sigma(t))
        noise = (z_t - alpha * z_student) / sigma
    else:
        t = process.uniform_timestep(integers(0, NUM_TIMESTEPS - 1, len(z_student), generator).to(z_student.device))
        noise = normal(z_student, generator)
        z_t = process.add_noise(z_student, noise, t)
    output = denoiser.predict(z_t, t, conditioning)
    return F.mse_loss(output, process.target(z_student, noise, t))
