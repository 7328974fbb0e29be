"""Samples seen as hidden states of the frozen teacher: re-noised features, and the term that matches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..denoiser import Conditioning, Denoiser
from ..rollout import Rollout
from ..settings import DistillerSettings
from .draws import choices, normal
from .shared_batch import Random, shared

VARIANCE_FLOOR = 1e-8


def draw_renoising(denoiser: Denoiser, timesteps: Sequence[int], z: Tensor, generator: Random) -> tuple[Tensor, Tensor]:
    """Return timesteps (B,), each of a uniform time in ``timesteps``, and noise shaped like ``z``."""
    tau = choices(timesteps, len(z), generator).to(z.device)
    return denoiser.process.uniform_timestep(tau), normal(z, generator)


def renoised_features(
    denoiser: Denoiser, z: Tensor, t: Tensor, noise: Tensor, conditioning: Conditioning
) -> list[Tensor]:
    """Return the hidden states at ``z`` re-noised to ``t``, in the current role."""
    return denoiser.features(denoiser.process.add_noise(z, noise, t), t, conditioning)


def feature_matching_term(
    denoiser: Denoiser, settings: DistillerSettings, z_student: Tensor, rollout: Rollout, generator: Random
) -> Tensor:
    """Return the distance of the student's and the teacher's samples as features; call in the role teacher.

    ``mean over depths of mean (f(z_student) - f(z_teacher))^2 / var f(z_teacher)``, both re-noised with the same noise
    to the same low level. It is a perceptual distance in latents: LPIPS' idea with the teacher as the network.
    """
    t, noise = draw_renoising(denoiser, settings.feature_timesteps, z_student, generator)
    batch = shared(generator, len(z_student))
    with torch.no_grad():
        wanted = renoised_features(denoiser, rollout.z_teacher, t, noise, rollout.conditioning)
    made = renoised_features(denoiser, z_student, t, noise, rollout.conditioning)
    distances = [
        F.mse_loss(one.float(), other.float()) / batch.variance(other.float()).clamp_min(VARIANCE_FLOOR)
        for one, other in zip(made, wanted, strict=True)
    ]
    return torch.stack(distances).mean()
