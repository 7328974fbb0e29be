"""How noise enters a ComfyUI MODEL, as a :class:`~..flash_core.process.Process`, and what ComfyUI calls it with."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

from ...flash_core.process import NUM_TIMESTEPS, FlowProcess, Prediction, Process, VPProcess, broadcast

# What a model predicts is what its ``calculate_denoised`` undoes; subclasses with another one (LCM, EDM) are others.
PREDICTIONS: dict[Any, Prediction] = {
    comfy.model_sampling.EPS.calculate_denoised: "epsilon",
    comfy.model_sampling.V_PREDICTION.calculate_denoised: "v_prediction",
    comfy.model_sampling.X0.calculate_denoised: "sample",
    comfy.model_sampling.CONST.calculate_denoised: "flow",
}


def process_of(sampling: Any) -> VPProcess | FlowProcess:
    """The noise process of a MODEL's ``model_sampling`` object.

    ComfyUI cannot hold an infinite noise level, so a schedule with zero terminal SNR ends at 4519 there; here it ends
    where it was trained, at no signal at all.

    Raises:
        ValueError: a kind of sampling that the method has no process for.
    """
    prediction = PREDICTIONS.get(type(sampling).calculate_denoised)
    if prediction == "flow":
        return FlowProcess(_shift(sampling))
    scaled = type(sampling).calculate_input is comfy.model_sampling.EPS.calculate_input
    discrete = type(sampling).timestep is comfy.model_sampling.ModelSamplingDiscrete.timestep
    if prediction is None or not scaled or not discrete or sampling.sigma_data != 1:
        kinds = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
        raise ValueError(
            f"This model samples with {kinds}, which cannot be distilled. Expected epsilon, v or x0 prediction on "
            "discrete timesteps (SD 1.5, SD 2, SDXL, PixArt), or flow (SD3, Flux): remove a ModelSampling node that "
            "makes it an LCM or EDM model, or load a base model."
        )
    alphas_cumprod = 1 / (1 + sampling.sigmas.double().cpu() ** 2)
    if sampling.zsnr:
        alphas_cumprod[-1] = 0
    return VPProcess(alphas_cumprod, prediction)


def _shift(sampling: Any) -> float:
    """The shift of a flow model's schedule, read off the schedule itself: ComfyUI's classes write it in two ways."""
    middle = float(sampling.percent_to_sigma(0.5))
    shift = middle / (1 - middle)
    for percent in (0.25, 0.75):
        expected = FlowProcess(shift).timestep(1 - percent) / NUM_TIMESTEPS
        if not math.isclose(float(sampling.percent_to_sigma(percent)), expected, rel_tol=1e-4):
            raise ValueError("This flow model's schedule is not a shifted one, which is all that can be distilled.")
    if getattr(sampling, "noise_scale", 1.0) != 1:
        raise ValueError(f"This flow model scales its noise by {sampling.noise_scale:g}; expected a scale of 1.")
    return shift


def model_input(sampling: Any, process: Process, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What ``BaseModel.apply_model`` takes for latents ``z_t = alpha_t z0 + sigma_t eps`` (B, C, h, w) at ``t`` (B,).

    ComfyUI's variance-preserving models take ``x = z0 + sigma eps`` with ``sigma = sigma_t / alpha_t`` and scale it
    back to ``z_t`` before the network sees it; its flow models take ``z_t`` and ``sigma = t / 1000``.

    Returns:
        ``(x, sigma)``, (B, C, h, w) and (B,).
    """
    if isinstance(process, FlowProcess):
        return z_t, t.float() / NUM_TIMESTEPS
    index = t.round().long() if t.is_floating_point() else t.long()
    sigma = sampling.sigmas.to(z_t.device)[index]
    return z_t * broadcast(torch.sqrt(1 + sigma**2), z_t), sigma
