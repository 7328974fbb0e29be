"""Few-step sampling inside ComfyUI: the trained noise levels of a model, and the sampler as a ComfyUI KSAMPLER."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..flash_core.grid import snapped_fractions
from ..flash_core.lora import FlashMetadata
from ..flash_core.process import NUM_TIMESTEPS
from ..flash_core.sampler import few_step_sample, generator_noise

METADATA_KEY = "flash_metadata"  # the ModelPatcher attachment in which a LoRA's metadata travels to the sampler

# Added to the seed where the initial noise came from elsewhere; any odd 64-bit constant does (this is SplitMix64's).
OTHER_STREAM = 0x9E3779B97F4A7C15


def sigma_of_fraction(sampling: Any, fraction: float) -> float:
    """The model's noise level at ``fraction`` in (0, 1] of the trailing schedule; 1 is pure noise.

    A model with discrete timesteps (SD, SDXL, PixArt) is asked at ``round(1000 u) - 1``, a flow model (SD3, Flux) at
    uniform time u, which its own shift bends.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return float(sampling.percent_to_sigma(1 - fraction))
    return sigma_of_timestep(sampling, max(round(sampling.num_timesteps * fraction) - 1, 0))


def sigma_of_timestep(sampling: Any, timestep: float) -> float:
    """The model's noise level at a trained timestep: 0..999, or 1000 s for a flow model."""
    if isinstance(sampling, comfy.model_sampling.CONST):
        return timestep / NUM_TIMESTEPS
    return float(sampling.sigma(torch.tensor(float(timestep))))


def trained_sigmas(model: ModelPatcher, steps: int, denoise: float = 1.0) -> Tensor:
    """The noise levels a few-step model was trained on, in ComfyUI's convention.

    Args:
        model: the MODEL; the metadata of a Flash LoRA attached to it names its timesteps, otherwise they are trailing.
        steps: evaluations of a full run.
        denoise: in (0, 1]; below 1 the run starts at the nearest trained timestep (see
            :func:`~..flash_core.grid.snapped_fractions`).

    Returns:
        (n + 1,) float32, descending, ending in 0; n is ``steps`` where ``denoise`` is 1.

    Raises:
        ValueError: the model has neither discrete timesteps nor flow sampling.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, (comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.CONST)):
        raise ValueError(
            f"This model samples with {type(sampling).__bases__[0].__name__}, which has no trained timesteps. "
            "Flash LoRAs exist for models with 1000 timesteps (SD 1.5, SDXL, PixArt) and flow models (SD3, Flux): load "
            "one of those, and remove a ModelSamplingContinuousEDM node if there is one."
        )
    metadata: FlashMetadata | None = model.get_attachment(METADATA_KEY)
    timesteps = metadata.timesteps.get(steps) if metadata is not None and denoise == 1 else None
    if timesteps:
        levels = [sigma_of_timestep(sampling, timestep) for timestep in timesteps]
    else:
        levels = [sigma_of_fraction(sampling, fraction) for fraction in snapped_fractions(steps, denoise)]
    return torch.tensor([*levels, 0.0])


def fresh_noise(initial: Tensor, seed: int) -> Callable[[], Tensor]:
    """The noise of the re-noising steps: the stream of ``seed``, continued after the initial noise.

    ComfyUI draws initial noise (B, C, H, W) on the CPU from ``seed``. Where ``initial`` is that draw, the same stream
    goes on, on any device, which is also what diffusers does with one generator. Where it is not (``batch_index``,
    noise of another node), an independent stream makes sure that the initial noise is never used again.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = generator_noise(initial, generator)
    if not torch.equal(draw(), initial):
        generator.manual_seed((seed + OTHER_STREAM) % 2**64)
    return draw


@torch.no_grad()
def sample_flash(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    stochasticity: float = 1.0,
) -> Tensor:
    """:func:`~..flash_core.sampler.few_step_sample` with the signature of a k-diffusion sampler.

    Args:
        model: ComfyUI's wrapped model, ``(x, sigma, **extra_args) -> z0``.
        x: the latents at ``sigmas[0]``.
        sigmas: (n + 1,), descending. Where the last one is above 0 (split sigmas) the result is noised to it.
        extra_args: what ComfyUI passes to the model; its ``seed`` seeds the re-noising.
        callback: ComfyUI's, called after every evaluation; it reports progress and raises where the user interrupts.
        disable: the console's progress bar, which this sampler does not draw.
        stochasticity: 1 re-noises with fresh noise, 0 with the noise that z0 implies.
    """
    arguments = extra_args or {}
    sampling = model.inner_model.inner_model.model_sampling
    steps = len(sigmas) - 1
    levels = [float(sigma) for sigma in (sigmas if sigmas[-1] > 0 else sigmas[:-1])]
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    noise_scale = getattr(sampling, "noise_scale", 1.0)  # some newer flow models; unknown to the oldest ComfyUI
    draw = fresh_noise(model.noise, arguments.get("seed") or 0)
    batch = x.new_ones(x.shape[0])

    def denoise(z: Tensor, index: int) -> Tensor:
        return model(z, sigmas[index] * batch, **arguments) if index < steps else z

    def report(index: int, z0: Tensor, z: Tensor) -> None:
        if callback is not None and index < steps:
            sigma = sigmas[index]
            callback({"x": z, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": z0})

    return few_step_sample(
        denoise,
        x,
        alphas=[1 - level if flow else 1.0 for level in levels],
        sigmas=levels,
        noise=lambda: draw() * noise_scale,
        stochasticity=stochasticity,
        callback=report,
    )


def flash_sampler(stochasticity: float = 1.0) -> comfy.samplers.KSAMPLER:
    """:func:`sample_flash` as a ComfyUI SAMPLER."""
    return comfy.samplers.KSAMPLER(sample_flash, extra_options={"stochasticity": stochasticity})
