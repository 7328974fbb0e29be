"""Few-step sampling in ComfyUI: the timesteps of a model and its LoRA, and the sampler as a KSAMPLER."""

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
    NUM_MODES,
    custom_timesteps,
    implied_shift,
    reference_timesteps,
    snapped_timesteps,
)
from ...flash_core.lora import FlashMetadata
from ...flash_core.presets import Recognised
from ...flash_core.process import NUM_TIMESTEPS, FlowProcess, Process
from ...flash_core.sampler import few_step_sample, item_noise
from ..shared.inputs import AUTO, GRIDS, GridName
from ..shared.model_facts import METADATA_KEY
from ..shared.process import process_of
from ..shared.schema import count
from .presets import check_preset, choose_preset, warnings
from .stochasticity import Transitions, choose_stochasticity, of_running_model, preset_transitions

SAMPLING_NODE = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}  # names in ModelSamplingDiscrete


def in_words(prediction: str) -> str:
    """Name a prediction for a user: ``v_prediction`` is "v"."""
    return {"v_prediction": "v", "sample": "the clean latent", "flow": "a velocity (flow)"}.get(prediction, prediction)


def sigma_of_timestep(sampling: Any, timestep: float) -> float:
    """The model's noise level at ``timestep`` (0..999; 1000 s for a flow model).

    Raises:
        ValueError: at this noise level the model gets another timestep.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return timestep / NUM_TIMESTEPS
    sigma = sampling.sigma(torch.tensor(float(timestep)))
    told = float(sampling.timestep(sigma))
    if abs(told - timestep) > 0.5:
        raise ValueError(
            f"The model cannot be evaluated at t = {timestep:g}: ComfyUI would give it t = {told:g}. The usual cause "
            "is a ModelSamplingDiscrete node set to 'lcm', which has only 50 timesteps. Remove this node (a Flash "
            "LoRA does not need it), or set grid to 'reference', which uses these 50 timesteps."
        )
    return float(sigma)


def check_prediction(metadata: FlashMetadata, process: Process) -> None:
    """Raise ValueError where the LoRA was trained on a model with another prediction than this model."""
    if metadata.prediction == process.prediction:
        return
    advice = "Load the checkpoint that the LoRA was made for"
    if metadata.prediction in SAMPLING_NODE and process.kind == "vp":
        advice += (
            ". If this is that checkpoint, ComfyUI has misread its prediction: put a ModelSamplingDiscrete node set to "
            f"'{SAMPLING_NODE[metadata.prediction]}' before this node"
        )
    raise ValueError(
        f"The Flash LoRA was trained on a model that predicts {in_words(metadata.prediction)} (base "
        f"{name_of(metadata.base)}); this model predicts {in_words(process.prediction)}. {advice}."
    )


def check_timesteps(trained: Mapping[int, Sequence[float]], process: Process) -> None:
    """Raise ValueError where the timesteps in a LoRA's metadata are not descending timesteps of this process."""
    for steps, timesteps in trained.items():
        descending = all(before > after for before, after in pairwise(timesteps))
        if not timesteps or not descending or not all(process.is_timestep(t) for t in timesteps):
            raise ValueError(
                f"The Flash LoRA's header lists the timesteps {list(timesteps)} for {steps} steps; expected "
                f"{process.timesteps_in_words}, in descending order. Correct the file's header, or set grid to "
                "'reference' or 'custom'."
            )


@dataclass(frozen=True)
class FlashGrid:
    """The timesteps of a run and the model's noise levels at them.

    Attributes:
        timesteps: descending; 0..999, or 1000 s for a flow model.
        sigmas: (n + 1,) float32, descending to 0, in ComfyUI's convention.
        text: for the node's face.
        steps: step count of a full run.
        preset: of the run, or None.
    """

    timesteps: tuple[float, ...]
    sigmas: Tensor
    text: str
    steps: int
    preset: Recognised | None = None


def flash_grid(
    model: ModelPatcher,
    steps: int,
    denoise: float = 1.0,
    grid: GridName = "trained",
    timesteps: str = "",
    preset: str = AUTO,
) -> FlashGrid:
    """Choose the timesteps at which a few-step model is evaluated.

    Args:
        model: the MODEL; its ``model_sampling`` may come from a ModelSampling node.
        steps: evaluations of a full run.
        denoise: in (0, 1]; below 1 the run starts later (see each grid's function). Default: 1.
        grid: ``trained`` uses :func:`~..flash_core.grid.snapped_timesteps` with the timesteps of the LoRA's metadata or
            of the preset;
            ``reference`` uses :func:`~..flash_core.grid.reference_timesteps`; ``custom`` uses
            :func:`~..flash_core.grid.custom_timesteps`. Default: ``trained``.
        timesteps: the list for ``custom``; then ``steps`` is not used. Default: empty.
        preset: the title of a preset, which comes before the LoRA's metadata; or ``auto`` for the LoRA's own facts.
            Default: ``auto``.

    Raises:
        ValueError: the model has no timesteps, the LoRA or the preset is for another kind of model, or a value is out
            of range.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid is {grid!r}; expected one of {', '.join(GRIDS)}.")
    if not 0 < denoise <= 1:
        raise ValueError(
            f"denoise is {denoise:g}; expected a number above 0 and up to 1. To keep the picture unchanged, bypass the "
            "node."
        )
    sampling = model.get_model_object("model_sampling")
    process = process_of(sampling)
    recognised = choose_preset(model, preset)
    metadata: FlashMetadata | None = model.get_attachment(METADATA_KEY) if recognised is None else None
    trained: Mapping[int, Sequence[float]] = {}
    warned: list[str] = []
    if recognised is not None:
        check_preset(recognised, process, model)
        warned = warnings(recognised, model, None if grid == "custom" else steps)
    if metadata is not None:
        check_prediction(metadata, process)
        if grid == "trained":
            trained = metadata.timesteps
            check_timesteps(trained, process)
    facts = []
    if isinstance(process, FlowProcess):
        set_shift = process.shift
        told_shift = recognised.preset.shift if recognised is not None and grid == "trained" else implied_shift(trained)
        process = FlowProcess(told_shift or set_shift)
        facts.append(f"flow shift {process.shift:.4g}")
        if not math.isclose(process.shift, set_shift, rel_tol=1e-3):
            owner = "the LoRA" if recognised is None else "the preset"
            facts.append(f"from {owner}; the model's shift {set_shift:.4g} is not used")
    else:
        facts.append(f"predicts {in_words(process.prediction)}")
    if trained and steps not in trained:
        facts.append(f"the LoRA was trained for {', '.join(map(str, sorted(trained)))} steps")
        if steps > max(trained):
            warned.append(f"WARNING: {count(steps, 'step')}; the LoRA was trained for at most {max(trained)}")
    if grid == "custom":
        chosen = custom_timesteps(process, timesteps, denoise)
    elif grid == "reference":
        dynamic = isinstance(sampling, comfy.model_sampling.ModelSamplingFlux)
        chosen = reference_timesteps(process, steps, denoise, dynamic_shift=dynamic)
    else:
        if recognised is not None:
            # Image to image keeps to the run's own timesteps: a LoRA for 2 steps knows no others.
            full = recognised.preset.grid(process, steps)
            trained = {steps: full, NUM_MODES: full}
        chosen = snapped_timesteps(process, steps, denoise, trained)
    facts.insert(0, count(len(chosen), "evaluation"))
    return FlashGrid(
        timesteps=tuple(chosen),
        sigmas=torch.tensor([*(sigma_of_timestep(sampling, t) for t in chosen), 0.0]),
        text="\n".join([f"t = {listed(chosen)}", *warned, f"({', '.join(facts)})"]),
        steps=steps,
        preset=recognised,
    )


def grid_transitions(model: ModelPatcher, chosen: FlashGrid, given: float | None = None) -> Transitions:
    """Return the transitions of a run: with the share ``given``, or with the value of the model's LoRA or preset."""
    process = process_of(model.get_model_object("model_sampling"))
    if chosen.preset is not None:
        return preset_transitions(chosen.preset, given, process, chosen.timesteps, chosen.steps)
    return choose_stochasticity(given, model.get_attachment(METADATA_KEY), process, chosen.timesteps)


def text_on_node(text: str, transitions: Transitions, warned: Sequence[str] = ()) -> str:
    """Put the transitions below the first line of a grid's text: a node shows two lines, and more when enlarged.

    Args:
        warned: more lines, below the transitions.
    """
    first, *others = text.split("\n")
    return "\n".join([first, *filter(None, [transitions.text]), *warned, *others])


def in_table(chosen: FlashGrid, transitions: Transitions) -> str:
    """Return the preset or the stochasticity of a run for the table; nothing for one evaluation without a preset."""
    if chosen.preset is not None:
        return f", {chosen.preset.preset.title}: {chosen.preset.preset.noise_in_words}"
    return f", stochasticity {transitions.stochasticity:g}" if transitions.text else ""


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
    stochasticity: float | None = None,
    preset: str = AUTO,
    transitions: Transitions | None = None,
    tell: Callable[[str], None] | None = None,
) -> Tensor:
    """Run :func:`~..flash_core.sampler.few_step_sample` with the signature of a k-diffusion sampler.

    A run from the model's last timestep starts from pure noise, even with a picture and a mask: the student was trained
    on pure noise there (arXiv 2406.02347, section 4.1), and diffusers' inpainting pipelines also start from pure noise
    at strength 1. (ComfyUI's samplers add alpha times the picture to the first noise, and show the model the noised
    picture where the mask keeps it.) After every step the part that the mask keeps is put back: at the step's noise
    level, and clean after the last step. Runs that begin later start from the noised picture.

    Args:
        model: ComfyUI's wrapped model, ``(x, sigma, **extra_args) -> z0``.
        x: the latents at ``sigmas[0]``, as ComfyUI noises them.
        sigmas: (n + 1,), descending. If the last one is above 0 (split sigmas), the result has this noise level.
            Without a step (n = 0, split at the first or last step) the result is ``x``.
        extra_args: ComfyUI's arguments for the model; their ``seed`` seeds the fresh noise.
        callback: ComfyUI's, called after every evaluation; it reports progress and raises if the user interrupts.
        disable: no effect: this sampler draws no progress bar in the console.
        stochasticity: 1 adds fresh noise, 0 the noise that z0 implies; None takes the value of the LoRA's metadata or
            of the preset (see :func:`~.stochasticity.of_running_model`). Default: None.
        preset: see :func:`flash_grid`. Default: ``auto``.
        transitions: chosen before the run; then ``stochasticity`` and ``preset`` are not read. Default: None.
        tell: gets the value that None stands for, or the preset, with its reason. Default: nobody is told.
    """
    if len(sigmas) < 2:
        return x
    arguments = extra_args or {}
    sampling = model.inner_model.inner_model.model_sampling
    steps = len(sigmas) - 1
    levels = [float(sigma) for sigma in (sigmas if sigmas[-1] > 0 else sigmas[:-1])]
    if transitions is None:
        transitions = of_running_model(model.inner_model, levels, stochasticity, preset)
        if tell is not None and transitions.text and (stochasticity is None or preset != AUTO):
            tell(transitions.text)
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    noise_scale = getattr(sampling, "noise_scale", 1.0)  # of some newer flow models; older ComfyUI has none
    draw = item_noise(model.noise, arguments.get("seed") or 0, x)
    mask, first_noise = arguments.get("denoise_mask"), model.noise
    batch = x.new_ones(x.shape[0])
    # A flow model's x is already pure noise at its last timestep.
    pure = not flow and starts_from_noise(sampling, levels[0], first_noise)
    if pure and transitions.starts_at_sigma:
        x = first_noise * sigmas[0]
    elif pure:
        x = sampling.noise_scaling(sigmas[0], first_noise, torch.zeros_like(x), True)

    def fresh() -> Tensor:
        noise = draw()
        if mask is not None:
            # ComfyUI noises the kept part with the run's first noise. A soft mask would mix this noise with fresh
            # noise: two independent noises, whose mixture is too weak. So both parts get one noise of full strength.
            noise = masked_noise(noise, first_noise.to(noise), mask.to(noise))
            model.noise = noise
        return noise * noise_scale

    def denoise(z: Tensor, index: int) -> Tensor:
        if index == steps:
            return z
        if index == 0 and pure and mask is not None:
            # With this noise the noised picture that ComfyUI mixes into z is z itself.
            model.noise = (z - model.latent_image) / sigmas[0]
        z0: Tensor = model(z, sigmas[index] * batch, **arguments)
        if index == 0:
            model.noise = first_noise
        return z0

    def report(index: int, z0: Tensor, z: Tensor) -> None:
        if callback is not None and index < steps:
            sigma = sigmas[index]
            callback({"x": z, "i": index, "sigma": sigma, "sigma_hat": sigma, "denoised": z0})

    whole = len(levels) == steps
    latents = few_step_sample(
        denoise,
        x,
        alphas=[1 - level if flow else 1.0 for level in levels],
        sigmas=levels,
        noise=fresh,
        stochasticity=transitions.stochasticity,
        second_order=transitions.second_order,
        end=transitions.end if whole else None,
        callback=report,
    )
    if mask is not None and whole and transitions.end is not None:
        # The kept part ends clean: it is the user's picture, without the noise that the run's end leaves elsewhere.
        latents = mask.to(latents) * latents + (1 - mask.to(latents)) * model.latent_image.to(latents)
    return latents


def starts_from_noise(sampling: Any, sigma: float, noise: Tensor) -> bool:
    """Return whether a run begins at the model's last timestep, and with noise (a continued run has none)."""
    last = float(sampling.sigma_max)
    return (sigma > last or math.isclose(sigma, last, rel_tol=1e-5)) and bool(noise.any())


def masked_noise(fresh: Tensor, first: Tensor, mask: Tensor) -> Tensor:
    """Mix fresh noise (``mask`` = 1) with the run's first noise (``mask`` = 0) to noise of variance 1.

    The mixture m fresh + (1 - m) first of two independent noises has the variance m^2 + (1 - m)^2: 1 for a hard mask,
    but 1/2 for m = 1/2. Then the latent would have less noise than its noise level, which few steps cannot correct. So
    the mixture is divided by its standard deviation. A hard mask (diffusers' pipelines round all masks) is unchanged.
    """
    return (mask * fresh + (1 - mask) * first) / (mask**2 + (1 - mask) ** 2).sqrt()


def flash_sampler(
    stochasticity: float | None = None,
    preset: str = AUTO,
    *,
    transitions: Transitions | None = None,
    tell: Callable[[str], None] | None = None,
) -> comfy.samplers.KSAMPLER:
    """Make a ComfyUI SAMPLER of :func:`sample_flash`.

    Args:
        stochasticity: in 0..1; None takes the LoRA's value when the run begins. Default: None.
        preset: see :func:`flash_grid`. Default: ``auto``.
        transitions: chosen before the run; then ``stochasticity`` and ``preset`` are not read. Default: None.
        tell: gets the value that None stands for, or the preset, with its reason. Default: nobody is told.
    """
    options = {"stochasticity": stochasticity, "preset": preset, "transitions": transitions, "tell": tell}
    return comfy.samplers.KSAMPLER(sample_flash, extra_options=options)
