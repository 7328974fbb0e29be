"""The losses, as stateless functions: distillation, adversarial, distribution matching. All return scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .process import Process, broadcast
from .terms.shared_batch import Random, shared

LatentLoss: TypeAlias = Literal["mse", "l1", "pseudo_huber"]
AdversarialLoss: TypeAlias = Literal["lsgan", "hinge", "non_saturating", "wgan", "vanilla", "relativistic"]

PSEUDO_HUBER_C = 1e-3  # the scale of latent consistency distillation (arXiv 2310.04378, section 4)
DMD_NORMALISER_FLOOR = 1e-5
MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556, section 3.4


def latent_loss(kind: LatentLoss, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean distance of two batches of latents (B, C, H, W).

    ``pseudo_huber`` is ``sqrt(d^2 + c^2) - c`` per element: quadratic below c, linear above.

    Args:
        weight: (B,) factor of each sample's distance. Default: 1 for all.
    """
    reduction = "mean" if weight is None else "none"
    if kind == "mse":
        distance = F.mse_loss(prediction, target, reduction=reduction)
    elif kind == "l1":
        distance = F.l1_loss(prediction, target, reduction=reduction)
    elif kind == "pseudo_huber":
        distance = ((prediction - target) ** 2 + PSEUDO_HUBER_C**2).sqrt() - PSEUDO_HUBER_C
    else:
        raise ValueError(f"unknown latent loss {kind!r}; expected one of {', '.join(get_args(LatentLoss))}")
    return distance.mean() if weight is None else (broadcast(weight, distance) * distance).mean()


def timestep_weight(kind: Literal["min_snr", "velocity"], process: Process, t: Tensor) -> Tensor:
    """Return the factor (B,) of a squared distance of clean latents at timesteps ``t`` (B,).

    ``min_snr``: ``min(SNR, 5)``, SNR = alpha^2 / sigma^2; 0 at pure noise of a schedule with zero terminal SNR.
    ``velocity``: ``1 / sigma^2``, with which the distance is that of the velocities that the latents imply.
    """
    alpha, sigma = process.alpha_sigma(t)
    if kind == "min_snr":
        return (alpha / sigma).square().clamp_max(MIN_SNR_GAMMA)
    return 1 / sigma.square()


def random_crops(generator: Random, size: int, *latents: Tensor) -> list[Tensor]:
    """Cut one random ``size`` x ``size`` window per sample, the same window from each of the ``latents``.

    Random windows, since a fixed centre crop leaves three quarters of a 1024 px image without a gradient.
    """
    batch, _, height, width = latents[0].shape
    tall, wide = min(size, height), min(size, width)
    tops = _corners(height - tall + 1, batch, generator)
    lefts = _corners(width - wide + 1, batch, generator)
    return [
        torch.stack([sample[:, y : y + tall, x : x + wide] for sample, y, x in zip(latent, tops, lefts, strict=True)])
        for latent in latents
    ]


def _corners(places: int, count: int, generator: Random) -> list[int]:
    """Return for each sample a number in ``0..places - 1``."""

    def draw(total: int, source: torch.Generator) -> Tensor:
        return torch.randint(places, (total,), generator=source, device=source.device)

    return shared(generator, count).draw(draw).tolist()


def perceptual_loss(
    perceptual: Callable[[Tensor, Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    prediction: Tensor,
    target: Tensor,
    crop: int,
    generator: Random,
    weight: Tensor | None = None,
) -> Tensor:
    """Return a perceptual distance (LPIPS) of random decoded crops.

    Args:
        perceptual: ``(images, images) -> (B,)`` or scalar, images (B, 3, H, W) in [-1, 1].
        decode: latents -> images in [-1, 1], differentiable.
        crop: window in latent pixels.
        weight: (B,) factor of each sample's distance, for a perceptual distance (B,). Default: 1 for all.

    Raises:
        ValueError: ``weight`` is given, and the perceptual distance is one number for the whole batch.
    """
    predicted, wanted = random_crops(generator, crop, prediction, target)
    with torch.no_grad():
        reference = decode(wanted)
    distance = perceptual(decode(predicted), reference)
    if weight is None:
        return distance.mean()
    if distance.shape != weight.shape:
        raise ValueError(
            f"samples with weights need a perceptual distance of each sample, shape {tuple(weight.shape)}; "
            f"got {tuple(distance.shape)}"
        )
    return (weight * distance).mean()


def generator_loss(kind: AdversarialLoss, fake: Sequence[Tensor], real: Sequence[Tensor] | None = None) -> Tensor:
    """Return the student's adversarial loss from the discriminator's logits of its samples at each depth.

    Args:
        real: the logits of the real samples of the same conditions, without gradient; for ``relativistic`` alone:
            ``softplus(-(D(fake) - D(real)))`` (RpGAN, arXiv 1807.00734, section 4.1).
    """
    if kind == "relativistic":
        if real is None:
            raise ValueError("the relativistic loss compares pairs: pass real=, the logits of the real samples")
        return torch.stack([F.softplus(r - f).mean() for r, f in zip(real, fake, strict=True)]).mean()
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
    if kind == "relativistic":
        return F.softplus(fake - real).mean()
    raise ValueError(f"unknown adversarial loss {kind!r}; expected one of {', '.join(get_args(AdversarialLoss))}")


def r1_penalty(real_logits: Sequence[Tensor], real_features: Sequence[Tensor]) -> Tensor:
    """Return ``|grad of D at the real features|^2``, mean over the batch (Mescheder et al., arXiv 1801.04406)."""
    total = torch.stack([logits.sum() / max(logits[0].numel(), 1) for logits in real_logits]).sum()
    gradients = torch.autograd.grad(total, list(real_features), create_graph=True)
    return torch.stack([gradient.flatten(1).pow(2).sum(1).mean() for gradient in gradients]).sum()


def distribution_matching_loss(
    z_student: Tensor, z0_real: Tensor, z0_fake: Tensor, kind: Literal["mse", "pseudo_huber"] = "mse"
) -> Tensor:
    """Return a loss whose gradient in ``z_student`` is the normalised difference of the fake and the real score.

    ``mse``: ``L = mean |z - stopgrad(z - w g)|^2``, ``g = z0_fake - z0_real``, and per sample
    ``w = 1 / (mean |z - z0_real| + 1e-5)`` (Yin et al., arXiv 2311.18828, as arXiv 2406.02347 uses it).
    ``pseudo_huber``: ``L = mean w (sqrt(|z - stopgrad(z - g)|^2 + c^2) - c)`` (arXiv 2503.06674).
    """
    with torch.no_grad():
        scale = broadcast((z_student - z0_real).abs().flatten(1).mean(1) + DMD_NORMALISER_FLOOR, z_student)
        difference = z0_fake - z0_real
        wanted = z_student - (difference / scale if kind == "mse" else difference)
    if kind == "mse":
        return F.mse_loss(z_student, wanted)
    return latent_loss("pseudo_huber", z_student, wanted, 1 / scale.flatten())
