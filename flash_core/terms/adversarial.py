"""The adversarial term: real and fake samples as the frozen teacher's features, re-noised with the same noise.

A discriminator that reads latents sees the samples themselves too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..denoiser import Conditioning, Denoiser
from ..discriminator import Discriminator
from ..rollout import Rollout
from ..settings import DistillerSettings
from .features import draw_renoising, renoised_features
from .shared_batch import Random


@dataclass(frozen=True)
class Seen:
    """What the heads saw in the student's adversarial loss, hidden states of the teacher above all; they learn from it.

    Attributes:
        t: (b,) the noise levels, of the b samples on which the term acts.
        noise: (b, C, H, W).
        fake: of the student's samples, detached.
        real: of the real samples; None where the loss did not need them.
    """

    t: Tensor
    noise: Tensor
    fake: list[Tensor]
    real: list[Tensor] | None


def generator_term(
    denoiser: Denoiser,
    discriminator: Discriminator,
    settings: DistillerSettings,
    z_student: Tensor,
    rollout: Rollout,
    generator: Random,
) -> tuple[Tensor, Seen]:
    """Return the student's adversarial loss, and what the teacher saw; call in the role teacher."""
    t, noise = draw_renoising(denoiser, settings.adversarial_timesteps, z_student, generator)
    fake = _views(denoiser, discriminator, z_student, t, noise, rollout.conditioning)
    real = None
    real_logits = None
    if settings.adversarial == "relativistic":  # the real sample of the same condition, noise and level
        with torch.no_grad():
            real = _views(denoiser, discriminator, real_samples(settings, rollout), t, noise, rollout.conditioning)
            real_logits = discriminator(real)
    loss = losses.generator_loss(settings.adversarial, discriminator(fake), real_logits)
    return loss, Seen(t, noise, [view.detach() for view in fake], real)


def discriminator_term(
    denoiser: Denoiser,
    discriminator: Discriminator,
    settings: DistillerSettings,
    z_student: Tensor,
    rollout: Rollout,
    generator: Random,
    seen: Seen | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the heads' loss, and what a log shows: loss, accuracy, D(real), D(fake), gradient penalty.

    Args:
        z_student: (B, C, H, W) the student's outputs, detached.
        seen: what :func:`generator_term` returned for the same samples, which spares the teacher's passes; None draws
            noise anew.
    """
    if seen is None:
        t, noise = draw_renoising(denoiser, settings.adversarial_timesteps, z_student, generator)
        real_views, fake_views = _both_views(denoiser, discriminator, settings, z_student, rollout, t, noise)
    else:
        real_views, fake_views = seen.real or _real_views(denoiser, discriminator, settings, rollout, seen), seen.fake
    real_views, fake_views = ([part.float() for part in parts] for parts in (real_views, fake_views))
    if settings.r1 > 0:
        real_views = [view.detach().requires_grad_() for view in real_views]
    real, fake = discriminator(real_views), discriminator(fake_views)
    loss = losses.discriminator_loss(settings.adversarial, real, fake)
    shown = {
        "discriminator": loss.detach(),
        "discriminator_accuracy": pair_accuracy(real, fake),
        "discriminator_real": mean_logit(real),
        "discriminator_fake": mean_logit(fake),
    }
    if settings.r1 > 0:
        penalty = losses.r1_penalty(real, real_views)
        shown["r1"] = penalty.detach()
        loss = loss + 0.5 * settings.r1 * penalty
    return loss, shown


def _views(
    denoiser: Denoiser,
    discriminator: Discriminator,
    z: Tensor,
    t: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
) -> list[Tensor]:
    """Return what each head reads: the teacher's hidden states, and ``z`` where a head reads latents."""
    features = renoised_features(denoiser, z, t, noise, conditioning)
    return [*features, z] if discriminator.reads_latents else features


@torch.no_grad()
def _both_views(
    denoiser: Denoiser,
    discriminator: Discriminator,
    settings: DistillerSettings,
    z_student: Tensor,
    rollout: Rollout,
    t: Tensor,
    noise: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the views of real and fake samples, from one batch that shares noise and levels."""
    with denoiser.role("teacher"):
        views = _views(
            denoiser,
            discriminator,
            torch.cat([real_samples(settings, rollout), z_student]),
            t.repeat(2),
            noise.repeat(2, 1, 1, 1),
            Conditioning.cat([rollout.conditioning] * 2),
        )
    halves = [view.chunk(2) for view in views]
    return [half[0] for half in halves], [half[1] for half in halves]


@torch.no_grad()
def _real_views(
    denoiser: Denoiser, discriminator: Discriminator, settings: DistillerSettings, rollout: Rollout, seen: Seen
) -> list[Tensor]:
    real = real_samples(settings, rollout)
    with denoiser.role("teacher"):
        return _views(denoiser, discriminator, real, seen.t, seen.noise, rollout.conditioning)


def real_samples(settings: DistillerSettings, rollout: Rollout) -> Tensor:
    """Return what the discriminator calls real: the data, or the teacher's solutions."""
    return rollout.z0 if settings.real == "data" else rollout.z_teacher


@torch.no_grad()
def mean_logit(logits: Sequence[Tensor]) -> Tensor:
    """Return the mean logit, each head counting the same."""
    return torch.stack([of_head.mean() for of_head in logits]).mean()


@torch.no_grad()
def pair_accuracy(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the share of pairs whose real sample has the higher mean logit, over all heads; 0.5 is chance."""
    differences = [(r - f).flatten(1).mean(1) for r, f in zip(real, fake, strict=True)]
    return torch.stack([0.5 * (1 + difference.sign()).mean() for difference in differences]).mean()
