"""The losses, as stateless functions: distillation, adversarial, distribution matching. All return scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LatentLoss: TypeAlias = Literal["mse", "l1", "pseudo_huber"]
AdversarialLoss: TypeAlias = Literal["lsgan", "hinge", "non_saturating", "wgan", "vanilla"]

PSEUDO_HUBER_C = 1e-3  # the scale of latent consistency distillation (arXiv 2310.04378, section 4)
DMD_NORMALISER_FLOOR = 1e-5


def latent_loss(kind: LatentLoss, prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean distance of two batches of latents (B, C, H, W).

    ``pseudo_huber`` is ``sqrt(d^2 + c^2) - c`` per element: quadratic below c, linear above.
    """
    if kind == "mse":
        return F.mse_loss(prediction, target)
    if kind == "l1":
        return F.l1_loss(prediction, target)
    if kind == "pseudo_huber":
        return (((prediction - target) ** 2 + PSEUDO_HUBER_C**2).sqrt() - PSEUDO_HUBER_C).mean()
    raise ValueError(f"unknown latent loss {kind!r}; expected one of {', '.join(get_args(LatentLoss))}")


def random_crops(generator: torch.Generator, size: int, *latents: Tensor) -> list[Tensor]:
    """Cut one random ``size`` x ``size`` window per sample, the same window from each of the ``latents``.

    Random windows, since a fixed centre crop leaves three quarters of a 1024 px image without a gradient.
    """
    batch, _, height, width = latents[0].shape
    tall, wide = min(size, height), min(size, width)
    tops = torch.randint(height - tall + 1, (batch,), generator=generator, device=generator.device).tolist()
    lefts = torch.randint(width - wide + 1, (batch,), generator=generator, device=generator.device).tolist()
    return [
        torch.stack([sample[:, y : y + tall, x : x + wide] for sample, y, x in zip(latent, tops, lefts, strict=True)])
        for latent in latents
    ]


def perceptual_loss(
    perceptual: Callable[[Tensor, Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    prediction: Tensor,
    target: Tensor,
    crop: int,
    generator: torch.Generator,
) -> Tensor:
    """Return a perceptual distance (LPIPS) of random decoded crops.

    Args:
        perceptual: ``(images, images) -> (B,)`` or scalar, images (B, 3, H, W) in [-1, 1].
        decode: latents -> images in [-1, 1], differentiable.
        crop: window in latent pixels.
    """
    predicted, wanted = random_crops(generator, crop, prediction, target)
    with torch.no_grad():
        reference = decode(wanted)
    return perceptual(decode(predicted), reference).mean()


def generator_loss(kind: AdversarialLoss, fake: Sequence[Tensor]) -> Tensor:
    """Return the student's adversarial loss from the discriminator's logits of its samples at each depth."""
    return torch.stack([_generator_term(kind, logits) for logits in fake]).mean()


def discriminator_loss(kind: AdversarialLoss, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the discriminator's loss from its logits of real and fake samples at each depth."""
    terms = [_discriminator_term(kind, r, f) for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean()


def _generator_term(kind: AdversarialLoss, fake: Tensor) -> Tensor:
    if kind == "lsgan":
        return ((fake - 1) ** 2).mean()
    if kind in ("hinge", "wgan"):
        return -fake.mean()
    if kind == "non_saturating":
        return F.softplus(-fake).mean()
    if kind == "vanilla":  # the original minimax form: minimise log(1 - D)
        return -F.softplus(fake).mean()
    raise ValueError(f"unknown adversarial loss {kind!r}; expected one of {', '.join(get_args(AdversarialLoss))}")


def _discriminator_term(kind: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
    if kind == "lsgan":
        return 0.5 * (((real - 1) ** 2).mean() + (fake**2).mean())
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "wgan":
        return fake.mean() - real.mean()
    if kind in ("non_saturating", "vanilla"):
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    raise ValueError(f"unknown adversarial loss {kind!r}; expected one of {', '.join(get_args(AdversarialLoss))}")


def r1_penalty(real_logits: Sequence[Tensor], real_features: Sequence[Tensor]) -> Tensor:
    """Return ``|grad of D at the real features|^2``, mean over the batch (Mescheder et al., arXiv 1801.04406)."""
    total = torch.stack([logits.sum() / max(logits[0].numel(), 1) for logits in real_logits]).sum()
    gradients = torch.autograd.grad(total, list(real_features), create_graph=True)
    return torch.stack([gradient.flatten(1).pow(2).sum(1).mean() for gradient in gradients]).sum()


def distribution_matching_loss(z_student: Tensor, z0_real: Tensor, z0_fake: Tensor) -> Tensor:
    """Return a loss whose gradient in ``z_student`` is the normalised difference of the fake and the real score.

    ``L = mean |z - stopgrad(z - w g)|^2``, ``g = z0_fake - z0_real``, and per sample
    ``w = 1 / (mean |z - z0_real| + 1e-5)`` (Yin et al., arXiv 2311.18828, as arXiv 2406.02347 uses it).
    """
    with torch.no_grad():
        scale = (z_student - z0_real).abs().flatten(1).mean(1) + DMD_NORMALISER_FLOOR
        wanted = z_student - (z0_fake - z0_real) / scale.reshape(-1, *(1 for _ in range(z_student.ndim - 1)))
    return F.mse_loss(z_student, wanted)
