"""The segments of a few-step run: the deterministic step from one timestep of the run to the next, and what is on it.

Trajectory distribution matching (TDM, arXiv 2503.06674) compares distributions at the end of a segment; intra-segment
guidance (ISG, arXiv 2506.00523) shows the student a point inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import losses
from ..denoiser import Denoiser, guided_z0
from ..passes.guidance import guided_rows
from ..process import NUM_TIMESTEPS, Process, broadcast
from ..rollout import Rollout, RolloutSource
from ..settings import DistillerSettings
from .draws import normal, uniform
from .shared_batch import Random

MARGIN = 20 / NUM_TIMESTEPS  # of a point inside a segment from both ends, where the segment is longer than two of them


def segment_ends(process: Process, starts: Sequence[float], steps: int) -> list[float]:
    """Return the fractions of the schedule at which segments end, of a run of ``steps``, that begin at ``starts``."""
    ends = [process.fraction(value) - 1 / steps for value in starts]
    return [end if end > 1e-4 else 0.0 for end in ends]


def levels_at(process: Process, fractions: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return timesteps (B,), alpha and sigma (B, 1, 1, 1) at fractions of the schedule; fraction 0 is the clean end."""
    t = torch.tensor([process.timestep(fraction) for fraction in fractions], device=like.device)
    clean = torch.tensor([fraction == 0 for fraction in fractions], device=like.device)
    alpha, sigma = process.alpha_sigma(t)
    return t, broadcast(alpha.masked_fill(clean, 1.0), like), broadcast(sigma.masked_fill(clean, 0.0), like)


def step_to(process: Process, z_t: Tensor, t: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the state at ``(alpha, sigma)`` after the prediction ``z0`` at ``(z_t, t)``; its noise is what z0 implies.

    This is DDIM's step, and Euler's for a flow.
    """
    alpha_t, sigma_t = (broadcast(value, z_t) for value in process.alpha_sigma(t))
    return alpha * z0 + sigma * (z_t - alpha_t * z0) / sigma_t


def diffused_from_segment_end(
    process: Process,
    z_student: Tensor,
    rollout: Rollout,
    steps: int,
    bounds: tuple[int, int],
    generator: Random,
) -> tuple[Tensor, Tensor]:
    """Return the student's state at the end of its segment, diffused on (B, C, H, W), and the timesteps (B,).

    The timesteps are on the CPU, so that reading them does not wait for the device.

    ``x_tau = a x' + sqrt(sigma_tau^2 - a^2 sigma'^2) eps`` with ``a = alpha_tau / alpha'`` and x' at the segment's end;
    tau is uniform between that level and ``bounds[1]``, but not below ``bounds[0]``, in uniform time 0..999.
    """
    ends = segment_ends(process, rollout.starts, steps)
    _, alpha, sigma = levels_at(process, ends, z_student)
    state = step_to(process, rollout.z_t, rollout.t, z_student, alpha, sigma)
    lowest = [max(bounds[0], math.ceil(NUM_TIMESTEPS * end)) for end in ends]
    share = uniform(len(ends), generator).tolist()
    tau = [low + int(part * max(bounds[1] - low + 1, 1)) for low, part in zip(lowest, share, strict=True)]
    t = process.uniform_timestep(torch.tensor(tau))
    alpha_tau, sigma_tau = (broadcast(value, state) for value in process.alpha_sigma(t.to(state.device)))
    ratio = alpha_tau / alpha
    spread = (sigma_tau.square() - (ratio * sigma).square()).clamp_min(0).sqrt()
    return ratio * state + spread * normal(state, generator), t


def intra_segment_term(
    source: RolloutSource, z_student: Tensor, rollout: Rollout, steps: int, generator: Random
) -> Tensor:
    """Return the distance of the student's direct step and its step by way of the teacher; call in the role teacher.

    By way of the teacher: the guided teacher steps to a point inside the segment, and the student from there to the
    segment's end. Pseudo-Huber, as published.
    """
    process, denoiser = source.denoiser.process, source.denoiser
    begins = [process.fraction(value) for value in rollout.starts]
    ends = segment_ends(process, rollout.starts, steps)
    share = uniform(len(ends), generator).tolist()
    inside = [inner_point(*point) for point in zip(begins, ends, share, strict=True)]
    _, alpha, sigma = levels_at(process, ends, z_student)
    with torch.no_grad():
        t_inside, alpha_inside, sigma_inside = levels_at(process, inside, z_student)
        guided = guided_by_teacher(denoiser, source.settings, rollout)
        z_inside = step_to(process, rollout.z_t, rollout.t, guided, alpha_inside, sigma_inside)
        with denoiser.role("student"):
            z0 = source.student_z0(z_inside, t_inside, rollout.conditioning)
        wanted = step_to(process, z_inside, t_inside, z0, alpha, sigma)
    direct = step_to(process, rollout.z_t, rollout.t, z_student, alpha, sigma)
    return losses.latent_loss("pseudo_huber", direct, wanted)


def inner_point(begin: float, end: float, share: float) -> float:
    """Return the fraction of the schedule at ``share`` of the way inside a segment, MARGIN from both ends."""
    margin = min(MARGIN, (begin - end) / 4)
    return end + margin + share * (begin - end - 2 * margin)


def guided_by_teacher(denoiser: Denoiser, settings: DistillerSettings, rollout: Rollout) -> Tensor:
    """Return the guided prediction z0 of the current role at the rollout's start."""
    rows = guided_rows(settings, denoiser.process, rollout.starts)
    parts = rollout.conditioning, rollout.unconditional, rollout.guidance
    return guided_z0(denoiser, rollout.z_t, rollout.t, *parts, rows)
