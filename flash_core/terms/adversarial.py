"""The adversarial term: real and fake samples re-noised with the same noise, seen as the frozen teacher's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import losses
from ..denoiser import Conditioning, Denoiser
from ..discriminator import Discriminator
from ..rollout import Rollout
from ..settings import DistillerSettings
from .features import draw_renoising, renoised_features


def generator_term(
    denoiser: Denoiser,
    discriminator: Discriminator,
    settings: DistillerSettings,
    z_student: Tensor,
    rollout: Rollout,
    generator: torch.Generator,
) -> Tensor:
    """Return the student's adversarial loss; call in the role teacher."""
    t, noise = draw_renoising(denoiser, settings.adversarial_timesteps, z_student, generator)
    fake = discriminator(renoised_features(denoiser, z_student, t, noise, rollout.conditioning))
    real = None
    if settings.adversarial == "relativistic":  # the real sample of the same condition, noise and level
        with torch.no_grad():
            real = discriminator(
                renoised_features(denoiser, real_samples(settings, rollout), t, noise, rollout.conditioning)
            )
    return losses.generator_loss(settings.adversarial, fake, real)


def discriminator_term(
    denoiser: Denoiser,
    discriminator: Discriminator,
    settings: DistillerSettings,
    z_student: Tensor,
    rollout: Rollout,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the heads' loss, and what a log shows: the loss, the accuracy, the gradient penalty.

    Args:
        z_student: (B, C, H, W) the student's outputs, detached.
    """
    t, noise = draw_renoising(denoiser, settings.adversarial_timesteps, z_student, generator)
    with torch.no_grad(), denoiser.role("teacher"):
        # Real and fake share the noise and the timestep, and one batch.
        features = renoised_features(
            denoiser,
            torch.cat([real_samples(settings, rollout), z_student]),
            t.repeat(2),
            noise.repeat(2, 1, 1, 1),
            Conditioning.cat([rollout.conditioning] * 2),
        )
    real_features, fake_features = zip(*(feature.float().chunk(2) for feature in features), strict=True)
    if settings.r1 > 0:
        real_features = tuple(feature.detach().requires_grad_() for feature in real_features)
    real, fake = discriminator(real_features), discriminator(fake_features)
    loss = losses.discriminator_loss(settings.adversarial, real, fake)
    shown = {"discriminator": loss.detach(), "discriminator_accuracy": pair_accuracy(real, fake)}
    if settings.r1 > 0:
        penalty = losses.r1_penalty(real, real_features)
        shown["r1"] = penalty.detach()
        loss = loss + 0.5 * settings.r1 * penalty
    return loss, shown


def real_samples(settings: DistillerSettings, rollout: Rollout) -> Tensor:
    """Return what the discriminator calls real: the data, or the teacher's solutions."""
    return rollout.z0 if settings.real == "data" else rollout.z_teacher


@torch.no_grad()
def pair_accuracy(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the share of pairs whose real sample has the higher mean logit, over all heads; 0.5 is chance."""
    differences = [(r - f).flatten(1).mean(1) for r, f in zip(real, fake, strict=True)]
    return torch.stack([0.5 * (1 + difference.sign()).mean() for difference in differences]).mean()
