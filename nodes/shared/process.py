"""The noise process of a ComfyUI MODEL: read its ``model_sampling`` as a :class:`~..flash_core.process.Process`."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_sampling
import torch

from ...flash_core.process import NUM_TIMESTEPS, FlowProcess, Prediction, VPProcess

# ComfyUI's classes for the prediction, subclasses before their bases, and our names. None: a class without timesteps.
PREDICTIONS: tuple[tuple[str, Prediction | None], ...] = (
    ("IMG_TO_IMG_FLOW", None),
    ("IMG_TO_IMG", None),
    ("EDM", None),
    ("X0", "sample"),
    ("V_PREDICTION", "v_prediction"),
    ("EPS", "epsilon"),
    ("CONST", "flow"),
)


def process_of(sampling: Any, *, to_distil: bool = False) -> VPProcess | FlowProcess:
    """The noise process of a MODEL's ``model_sampling``, whichever node set it.

    Args:
        sampling: ComfyUI's object.
        to_distil: also check that the model can be distilled. Three kinds of models can be sampled but not distilled:
            models set to ``lcm``, epsilon models with zero terminal SNR, and flow models with scaled noise or with a
            schedule that is no shifted one. ComfyUI has no infinite noise level: its schedules with zero terminal SNR
            end at sigma = 4519. To distil, the process ends at alpha = 0, as in training. Default: False.

    Raises:
        ValueError: the model has neither discrete timesteps nor flow sampling, or cannot be distilled.
    """
    prediction = _prediction(sampling)
    if prediction == "flow" and (_is_standard(sampling) or not to_distil):
        half = float(sampling.percent_to_sigma(0.5))  # shift / (1 + shift): SD3's shift, or Flux' as exp(mu)
        shift = half / (1 - half)
        if to_distil:
            _check_shifted(sampling, shift)
        return FlowProcess(shift)
    discrete = isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) and not isinstance(
        sampling, (comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.ModelSamplingDiscreteEDM)
    )
    if prediction is None or not discrete or (to_distil and not _is_standard(sampling)):
        raise ValueError(_refusal(sampling, to_distil))
    # The table of a model set to 'lcm' has 50 levels; asked by timestep, it has 1000 as every other one.
    sigmas = sampling.sigmas if to_distil else sampling.sigma(torch.arange(sampling.num_timesteps))
    sigmas = sigmas.double().cpu()
    alphas_cumprod = 1 / (1 + sigmas**2)
    if to_distil and sampling.zsnr:
        alphas_cumprod[-1] = 0
    return VPProcess(alphas_cumprod, prediction)


def _prediction(sampling: Any) -> Prediction | None:
    """Return the model's prediction, or None for a kind of sampling without timesteps."""
    return next(
        (ours for name, ours in PREDICTIONS if isinstance(sampling, getattr(comfy.model_sampling, name, ()))), None
    )


def _is_standard(sampling: Any) -> bool:
    """Return whether ComfyUI's own formulas hold, and no subclass (LCM, EDM) replaces them."""
    base, kind = comfy.model_sampling, type(sampling)
    if kind.calculate_denoised is base.CONST.calculate_denoised:
        return True
    return (
        kind.calculate_denoised in [one.calculate_denoised for one in (base.EPS, base.V_PREDICTION, base.X0)]
        and kind.calculate_input is base.EPS.calculate_input
        and kind.timestep is base.ModelSamplingDiscrete.timestep
        and sampling.sigma_data == 1
    )


def _check_shifted(sampling: Any, shift: float) -> None:
    """Raise ValueError where a flow model's schedule is not ``shift``, or its noise is scaled."""
    for percent in (0.25, 0.75):
        expected = FlowProcess(shift).timestep(1 - percent) / NUM_TIMESTEPS
        if not math.isclose(float(sampling.percent_to_sigma(percent)), expected, rel_tol=1e-4):
            raise ValueError(
                "This flow model has a noise schedule of its own. Only a shifted schedule, as that of SD3 or Flux, can "
                "be distilled. Remove the node that changes the schedule, or load another model."
            )
    scale = getattr(sampling, "noise_scale", 1.0)
    if scale != 1:
        raise ValueError(
            f"This flow model scales its noise by {scale:g}. Only models with a scale of 1 can be distilled. Load "
            "another model."
        )


def _refusal(sampling: Any, to_distil: bool) -> str:
    kinds = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
    if to_distil:
        return (
            f"This model samples with {kinds}, which cannot be distilled. Expected epsilon, v or x0 prediction on "
            "discrete timesteps (SD 1.5, SD 2, SDXL, PixArt), or flow (SD3, Flux). Remove a ModelSampling node that "
            "makes the model an LCM or EDM model, or load a base model."
        )
    return (
        f"This model samples with {kinds}, which has no trained timesteps. Flash LoRAs exist for models with 1000 "
        "timesteps (SD 1.5, SDXL, PixArt) and for flow models (SD3, Flux). Load one of these models, and remove a "
        "ModelSamplingContinuousEDM node if there is one."
    )
