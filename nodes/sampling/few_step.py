"""Few-step sampling inside ComfyUI: the timesteps of a model and its LoRA, and the sampler as a ComfyUI KSAMPLER."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...flash_core.families import name_of
from ...flash_core.grid import (
    custom_timesteps,
    implied_shift,
    reference_timesteps,
    snapped_timesteps,
)
from ...flash_core.lora import FlashMetadata
from ...flash_core.process import NUM_TIMESTEPS, FlowProcess, Process
from ...flash_core.sampler import few_step_sample, item_noise
from ..shared.inputs import GRIDS, GridName
from ..shared.model_facts import METADATA_KEY
from ..shared.process import process_of
from ..shared.schema import count

SAMPLING_NODE = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}  # names in ModelSamplingDiscrete


def in_words(prediction: str) -> str:
    """What a network predicts, as a user reads it."""
    return {"v_prediction": "v", "sample": "the clean latent", "flow": "a velocity (flow)"}.get(prediction, prediction)


def sigma_of_timestep(sampling: Any, timestep: float) -> float:
    """The model's noise level at a timestep: 0..999, or 1000 s for a flow model.

    Raises:
        ValueError: at that level the model would be told another timestep.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return timestep / NUM_TIMESTEPS
    sigma = sampling.sigma(torch.tensor(float(timestep)))
    told = float(sampling.timestep(sigma))
    if abs(told - timestep) > 0.5:
        raise ValueError(
            f"The model can't be asked at t = {timestep:g}: it would be told t = {told:g}. That is what a "
            "ModelSamplingDiscrete node set to 'lcm' does, which knows 50 timesteps only. Remove it (a Flash LoRA does "
            "not need it), or set grid to 'reference', whose timesteps are among those 50."
        )
    return float(sigma)


def check_prediction(metadata: FlashMetadata, process: Process) -> None:
    """Raise ValueError where a LoRA was trained on a model that predicts something else than this one."""
    if metadata.prediction == process.prediction:
        return
    advice = "Load the checkpoint that the LoRA was made for"
    if metadata.prediction in SAMPLING_NODE and process.kind == "vp":
        advice += (
            ", or, where this is it and ComfyUI took it for another kind, put a ModelSamplingDiscrete node set to "
            f"'{SAMPLING_NODE[metadata.prediction]}' before this one"
        )
    raise ValueError(
        f"The Flash LoRA was trained on a model that predicts {in_words(metadata.prediction)} (base "
        f"{name_of(metadata.base)}); this model predicts {in_words(process.prediction)}. {advice}."
    )


def check_timesteps(trained: Mapping[int, Sequence[float]], process: Process) -> None:
    """Raise ValueError where the timesteps that a LoRA's header lists are none of this process."""
    for steps, timesteps in trained.items():
        descending = all(before > after for before, after in pairwise(timesteps))
        if not timesteps or not descending or not all(process.is_timestep(t) for t in timesteps):
            raise ValueError(
                f"The Flash LoRA's header lists the timesteps {list(timesteps)} for {steps} steps; expected "
                f"{process.timesteps_in_words}, descending. Correct the file's header, or set grid to 'reference' or "
                "'custom'."
            )


@dataclass(frozen=True)
class FlashGrid:
    """The timesteps of a run and the model's noise levels at them.

    Attributes:
        timesteps: descending; 0..999, or 1000 s for a flow model.
        sigmas: (n + 1,) float32, descending, ending in 0, in ComfyUI's convention.
        text: what the user sees on the node.
    """

    timesteps: tuple[float, ...]
    sigmas: Tensor
    text: str


def flash_grid(
    model: ModelPatcher, steps: int, denoise: float = 1.0, grid: GridName = "trained", timesteps: str = ""
) -> FlashGrid:
    """The timesteps a few-step model is evaluated at.

    Args:
        model: the MODEL, with the ``model_sampling`` that it or a node after it has.
        steps: evaluations of a full run.
        denoise: in (0, 1]; below 1 the run starts later (see each grid's function).
        grid: ``trained`` is :func:`~..flash_core.grid.snapped_timesteps`, for the timesteps that the Flash LoRA's
            metadata names, else trailing ones; ``reference`` is :func:`~..flash_core.grid.reference_timesteps`, and
            ``custom`` :func:`~..flash_core.grid.custom_timesteps`.
        timesteps: the list for ``custom``; its length takes the place of ``steps``.

    Raises:
        ValueError: the model has no timesteps, the LoRA is for another kind of model, or a value is out of its range.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid is {grid!r}; expected one of {', '.join(GRIDS)}.")
    if not 0 < denoise <= 1:
        raise ValueError(
            f"denoise is {denoise:g}; expected a number above 0 and up to 1. To keep the picture as it is, bypass the "
            "node."
        )
    sampling = model.get_model_object("model_sampling")
    process = process_of(sampling)
    metadata: FlashMetadata | None = model.get_attachment(METADATA_KEY)
    trained: Mapping[int, Sequence[float]] = {}
    if metadata is not None:
        check_prediction(metadata, process)
        if grid == "trained":
            trained = metadata.timesteps
            check_timesteps(trained, process)
    facts = []
    if isinstance(process, FlowProcess):
        set_shift = process.shift
        process = FlowProcess(implied_shift(trained) or set_shift)
        facts.append(f"flow shift {process.shift:.4g}")
        if not math.isclose(process.shift, set_shift, rel_tol=1e-3):
            facts.append(f"the LoRA's own: the model's {set_shift:.4g} is not used")
    else:
        facts.append(f"predicts {in_words(process.prediction)}")
    if trained and steps not in trained:
        facts.append(f"the LoRA was trained for {', '.join(map(str, sorted(trained)))} steps")
    if grid == "custom":
        chosen = custom_timesteps(process, timesteps, denoise)
    elif grid == "reference":
        dynamic = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
        chosen = reference_timesteps(process, steps, denoise, dynamic_shift=dynamic)
    else:
        chosen = snapped_timesteps(process, steps, denoise, trained)
    facts.insert(0, count(len(chosen), "evaluation"))
    return FlashGrid(
        timesteps=tuple(chosen),
        sigmas=torch.tensor([*(sigma_of_timestep(sampling, t) for t in chosen), 0.0]),
        text=f"t = {listed(chosen)}\n({', '.join(facts)})",
    )


def listed(timesteps: Sequence[float]) -> str:
    """``999, 749, 499, 249``, with at most one decimal."""
    return ", ".join(f"{round(t, 1):g}" for t in timesteps)


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

    A run from the model's last timestep starts from pure noise, everywhere, whatever picture and mask it is given: so
    the method trains the student at its first timestep (arXiv 2406.02347, section 4.1), and so diffusers' inpainting
    pipelines start at strength 1. The part that a mask keeps is put in after every step, at that step's noise level,
    and clean after the last one. ComfyUI's samplers leave alpha times the picture in the first noise, and show the
    model the noised picture where the mask keeps it. Runs that begin later start from the noised picture.

    Args:
        model: ComfyUI's wrapped model, ``(x, sigma, **extra_args) -> z0``.
        x: the latents at ``sigmas[0]``, as ComfyUI noises them.
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
    draw = item_noise(model.noise, arguments.get("seed") or 0, x)
    mask, first_noise = arguments.get("denoise_mask"), model.noise
    batch = x.new_ones(x.shape[0])
    # A flow model's x is nothing but noise at its last timestep.
    pure = not flow and starts_from_noise(sampling, levels[0], first_noise)
    if pure:
        x = sampling.noise_scaling(sigmas[0], first_noise, torch.zeros_like(x), True)

    def fresh() -> Tensor:
        noise = draw()
        if mask is not None:
            # ComfyUI noises what a mask keeps with the run's first noise. Where a soft mask mixes that with fresh noise
            # the two are independent, and their mixture would be too weak; both sides get one of full strength.
            noise = masked_noise(noise, first_noise.to(noise), mask.to(noise))
            model.noise = noise
        return noise * noise_scale

    def denoise(z: Tensor, index: int) -> Tensor:
        if index == steps:
            return z
        if index == 0 and pure and mask is not None:
            # With this noise ComfyUI's noised picture, which it mixes into z where the mask keeps it, is z itself.
            model.noise = (z - model.latent_image) / sigmas[0]
        z0 = model(z, sigmas[index] * batch, **arguments)
        if index == 0:
            model.noise = first_noise
        return z0

    def report(index: int, z0: Tensor, z: Tensor) -> None:
        if callback is not None and index < steps:
            sigma = sigmas[index]
            callback({"x": z, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": z0})

    return few_step_sample(
        denoise,
        x,
        alphas=[1 - level if flow else 1.0 for level in levels],
        sigmas=levels,
        noise=fresh,
        stochasticity=stochasticity,
        callback=report,
    )


def starts_from_noise(sampling: Any, sigma: float, noise: Tensor) -> bool:
    """Whether a run begins at the model's last timestep; one without noise (a continued one) does not."""
    last = float(sampling.sigma_max)
    return (sigma > last or math.isclose(sigma, last, rel_tol=1e-5)) and bool(noise.any())


def masked_noise(fresh: Tensor, first: Tensor, mask: Tensor) -> Tensor:
    """Fresh noise where ``mask`` is 1, the run's first noise where it is 0, a mixture of unit variance between.

    With a hard mask that is what diffusers' inpainting pipelines do. They round soft masks; here grey keeps its share
    of the picture at every step. Its noise is then a mixture of two independent ones, m fresh + (1 - m) first, whose
    variance m^2 + (1 - m)^2 is 1 for a hard mask and only 1/2 in the middle: a latent with less noise than its level
    says, which few steps do not make up for. Hence the division; at 0 and 1 it divides by 1, so a hard mask is the
    limit of soft ones.
    """
    return (mask * fresh + (1 - mask) * first) / (mask**2 + (1 - mask) ** 2).sqrt()


def flash_sampler(stochasticity: float = 1.0) -> comfy.samplers.KSAMPLER:
    """:func:`sample_flash` as a ComfyUI SAMPLER.

    Raises:
        ValueError: ``stochasticity`` is outside 0..1, as a number that comes over a link may be.
    """
    if not 0 <= stochasticity <= 1:
        raise ValueError(
            f"stochasticity is {stochasticity:g}; expected 0 (the noise that the prediction implies) to 1 (fresh "
            "noise). Correct the number that is connected."
        )
    return comfy.samplers.KSAMPLER(sample_flash, extra_options={"stochasticity": stochasticity})
