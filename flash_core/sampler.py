"""The few-step sampler: predict z0, re-noise to the next level with fresh noise, again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

SampleCallback = Callable[[int, Tensor, Tensor], None]


def few_step_sample(
    denoise: Callable[[Tensor, int], Tensor],
    z: Tensor,
    alphas: Sequence[float],
    sigmas: Sequence[float],
    noise: Callable[[], Tensor],
    *,
    stochasticity: float | Sequence[float] = 1.0,
    second_order: bool = False,
    end: tuple[float, float] | None = None,
    callback: SampleCallback | None = None,
) -> Tensor:
    """Sample in few steps, as the student is trained for (arXiv 2406.02347, section 4.1; LCM's scheme).

    Args:
        denoise: ``(z, i) -> z0``, the model's clean prediction at level ``i``, ``z`` and z0 of shape (B, C, H, W).
        z: the latents at level 0.
        alphas, sigmas: the N levels, ``z_i = alpha_i z0 + sigma_i eps``. A ComfyUI epsilon or v model counts
            ``alpha = 1`` and the k-diffusion sigma; a flow model ``alpha = 1 - s``.
        noise: draws fresh noise shaped like ``z``; asked N - 1 times when ``stochasticity`` > 0, so that a generator's
            stream is used as diffusers' few-step scheduler uses it, and never when it is 0.
        stochasticity: 1 re-noises with fresh noise (the paper), 0 with the noise that z0 implies (DDIM); in between
            the two are mixed at unit variance. One number, or N - 1 numbers: one for each transition.
        second_order: extrapolate z0 from this and the last prediction on the way to the next level, as DPM-Solver++(2M)
            does (arXiv 2211.01095, algorithm 2); the first and the last step are of first order. Default: False.
        end: ``(alpha, sigma)`` of the level at which the result lies, with the noise that the last z0 implies.
            Default: the last z0.
        callback: ``(i, z0, z)`` after each prediction.

    Returns:
        The last z0, or ``alpha z0 + sigma eps`` at ``end``.
    """
    if len(alphas) != len(sigmas) or not sigmas:
        raise ValueError(f"expected as many alphas as sigmas and at least one, got {len(alphas)} and {len(sigmas)}")
    shares = [stochasticity] * (len(sigmas) - 1) if isinstance(stochasticity, (int, float)) else list(stochasticity)
    told = [stochasticity] if isinstance(stochasticity, (int, float)) else shares
    if not all(0 <= share <= 1 for share in told) or len(shares) != len(sigmas) - 1:
        raise ValueError(
            f"stochasticity must lie in 0..1 and be one number, or one for each of the {len(sigmas) - 1} transitions; "
            f"got {stochasticity}"
        )
    z0 = z
    for index in range(len(sigmas)):
        before, z0 = z0, denoise(z, index)
        if callback is not None:
            callback(index, z0, z)
        if index + 1 == len(sigmas):
            break
        mean = z0
        if second_order and index > 0:
            mean = z0 + (z0 - before) * _next_half(alphas[index - 1 : index + 2], sigmas[index - 1 : index + 2])
        share = shares[index]
        if share == 1:
            eps = noise()
        else:
            eps = (z - alphas[index] * mean) / sigmas[index]
            if share > 0:
                eps = (1 - share**2) ** 0.5 * eps + share * noise()
        z = alphas[index + 1] * mean + sigmas[index + 1] * eps
    if end is None:
        return z0
    return end[0] * z0 + end[1] * (z - alphas[-1] * z0) / sigmas[-1]


def _next_half(alphas: Sequence[float], sigmas: Sequence[float]) -> float:
    """Return half of the next step over the last one, in log(alpha/sigma), of the levels before, now and next."""
    before, now, after = (
        math.log(alpha / sigma) if alpha > 0 else -math.inf for alpha, sigma in zip(alphas, sigmas, strict=True)
    )
    return (after - now) / (now - before) / 2  # 0 where the run began at pure noise


def generator_noise(like: Tensor, generator: torch.Generator) -> Callable[[], Tensor]:
    """Return a noise source for :func:`few_step_sample`: one generator's stream, drawn on the generator's device."""

    def draw() -> Tensor:
        return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)

    return draw


def item_noise(initial: Tensor, seed: int, z: Tensor | None = None) -> Callable[[], Tensor]:
    """Return a noise source for :func:`few_step_sample` in which every item of a batch has its own stream.

    An item's noise depends on ``seed`` and on the item's own initial noise. It depends neither on the item's place in
    the batch nor on the batch's size. The item that begins with the seed's first draw, a single picture or the
    first of a batch, continues the stream of the seed, as diffusers does with one generator. Any other item draws from
    a generator that is seeded by a hash. All noise is drawn in float32 on the CPU: the same on every device.

    Args:
        initial: the noise that the run begins with, (B, ...), before any scaling.
        seed: the run's seed; torch reads its low 32 bits where it seeds a generator.
        z: the latents that the run begins with, (B, C, ...). They tell items apart that have no initial noise, as in
            the second half of a run that was split in two, by where each channel is largest.
    """
    items = initial.detach().float().cpu()
    generators = []
    for index, item in enumerate(items):
        generator = torch.Generator().manual_seed(seed % 2**32)
        first = torch.randn(item.shape, generator=generator).to(initial.dtype).float()
        if not torch.equal(first, item):
            if z is not None and not item.any():
                item = z[index].flatten(1).argmax(1).float().cpu()
            digest = blake2b(item.contiguous().numpy().tobytes(), key=(seed % 2**64).to_bytes(8, "little"))
            generator.manual_seed(int.from_bytes(digest.digest()[:4], "little"))
        generators.append(generator)

    def draw() -> Tensor:
        noise = torch.stack([torch.randn(items.shape[1:], generator=generator) for generator in generators])
        return noise.to(initial)

    return draw
