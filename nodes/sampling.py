"""Sampling with a few-step model: all in one, or as SIGMAS and SAMPLER for ComfyUI's custom sampling."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..flash_core.grid import MAX_FEW_STEPS
from .few_step import GRIDS, GridName, flash_grid, flash_sampler
from .schema import advanced, node_schema, show_text

MAX_SEED = 2**64 - 1
PIXART_MINIMUM = 66  # latent height + width from which its position embeddings in ComfyUI do not divide by zero

STEPS_TOOLTIP = (
    "Model evaluations. Each step count has its own trained timesteps (4: t = 999, 749, 499, 249). They are shown on "
    "the node when it has run."
)
DENOISE_TOOLTIP = (
    "1 makes a new picture. Below 1 keeps that much of the input latent: the run starts at the nearest timestep the "
    "model was trained on, so few values differ (with 4 steps: .25, .5, .75, 1)."
)
GRID_TOOLTIP = (
    "Which timesteps are evaluated. trained: those the LoRA was trained on, the best choice. reference: those of the "
    "published diffusers pipelines (999, 759, 499, 259), to compare with them. custom: those listed under timesteps."
)
TIMESTEPS_TOOLTIP = (
    "Only with grid 'custom': timesteps from noise to image, separated by commas: 999, 749, 499, 249 (0 to 999); for "
    "SD3 and Flux 1000, 900, 750, 500 (1000 times the noise level). All of them are evaluated, so steps is not used. "
    "With denoise below 1 the run starts at the listed timestep that is nearest to it."
)
STOCHASTICITY_TOOLTIP = (
    "1: fresh noise at every step, as the model was trained. 0: the noise that the prediction implies (DDIM, or Euler "
    "for SD3 and Flux), which varies less with the seed and is often softer. Between them: a mixture."
)


def steps_input() -> io.Input:
    """The widget for a step count."""
    return io.Int.Input("steps", default=4, min=1, max=MAX_FEW_STEPS, tooltip=STEPS_TOOLTIP)


def denoise_input() -> io.Input:
    """The widget for how much of a picture is made anew."""
    return io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, round=0.01, tooltip=DENOISE_TOOLTIP)


def grid_inputs() -> list[io.Input]:
    """The widgets for the choice of timesteps; optional, so that API workflows without them run."""
    return [
        advanced(io.Combo.Input, "grid", options=list(GRIDS), default=GRIDS[0], optional=True, tooltip=GRID_TOOLTIP),
        advanced(
            io.String.Input,
            "timesteps",
            default="",
            placeholder="999, 749, 499, 249",
            optional=True,
            tooltip=TIMESTEPS_TOOLTIP,
        ),
    ]


def stochasticity_input(widget: Callable[..., io.Input] = io.Float.Input, **fields: Any) -> io.Input:
    """The widget for fresh noise; ``widget`` makes it."""
    return widget(
        "stochasticity",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.05,
        round=0.01,
        tooltip=STOCHASTICITY_TOOLTIP,
        **fields,
    )


def fixed_latent(model: ModelPatcher, latent: dict[str, Any]) -> Any:
    """The latent's samples, with an empty latent brought to the model's channels as ComfyUI's own samplers do."""
    sizes = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # spelt so by newer ComfyUI, which alone sets them
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: latent.get(name) for name in sizes if name in known}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    channels = model.get_model_object("latent_format").latent_channels
    if isinstance(model.model, comfy.model_base.PixArt):
        height, width = samples.shape[-2:]
        if height % 2 or width % 2 or height + width < PIXART_MINIMUM:
            raise ValueError(
                f"This latent is for a picture of {8 * width} x {8 * height} pixels. ComfyUI's PixArt works on sides "
                "that are multiples of 16, and from 264 on. Choose such a size, at best one near the model's own."
            )
    if not samples.is_nested and samples.shape[1] != channels:
        raise ValueError(
            f"This latent has {samples.shape[1]} channels, the model works on {channels}. Encode the picture with the "
            "VAE that belongs to this model."
        )
    return samples


class FlashSampler(io.ComfyNode):
    """Text, image or mask to latent in 1-8 evaluations."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashSampler",
            display_name="Flash Sampler",
            search_aliases=["few-step sampler", "ksampler", "lcm", "turbo", "lightning", "flash diffusion"],
            description="Samples a few-step (Flash) model on exactly the timesteps it was trained on.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its Flash LoRA: connect Flash LoRA Loader."),
                io.Conditioning.Input("positive", tooltip="What to show. ControlNets, masks and areas work as usual."),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent for its size, or an encoded picture (see denoise)."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The same seed gives the same picture; its first noise is KSampler's at the same seed.",
                ),
                steps_input(),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Classifier-free guidance (KSampler's cfg). Flash models have it built in: leave it at 1, "
                    "which also needs half the time. Above 1 a negative prompt must be connected.",
                ),
                denoise_input(),
                *grid_inputs(),
                stochasticity_input(functools.partial(advanced, io.Float.Input), optional=True),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid. Used only where guidance is above 1."
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The clean latent; connect VAE Decode.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        guidance: float,
        denoise: float,
        grid: GridName = "trained",
        timesteps: str = "",
        stochasticity: float = 1.0,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Sample; the returned latent keeps the input's mask and batch index."""
        import latent_preview  # ComfyUI's; not importable before its server has started

        if guidance > 1 and negative is None:
            raise ValueError(
                f"Guidance is {guidance:g}, which compares with a negative prompt, and none is connected. Connect a "
                "CLIP Text Encode (its text may be empty) to 'negative', or set guidance to 1."
            )
        samples = fixed_latent(model, latent_image)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        chosen = flash_grid(model, steps, denoise, grid, timesteps)
        show_text(cls, chosen.text)
        guider = comfy.samplers.CFGGuider(model)
        conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
        guider.inner_set_conds(conds)
        guider.set_cfg(guidance)
        sampled = guider.sample(
            noise,
            samples,
            flash_sampler(stochasticity),
            chosen.sigmas,
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(chosen.timesteps)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        kept = {key: value for key, value in latent_image.items() if not key.startswith("downscale_ratio_")}
        return io.NodeOutput({**kept, "samples": sampled.to(comfy.model_management.intermediate_device())})


class FlashScheduler(io.ComfyNode):
    """The trained noise levels as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashScheduler",
            display_name="Flash Scheduler",
            search_aliases=["few-step sigmas", "trailing timesteps", "lcm scheduler", "sgm_uniform"],
            description="The noise levels that a few-step (Flash) model was trained on, for SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its Flash LoRA; its own noise schedule is used."),
                steps_input(),
                denoise_input(),
                *grid_inputs(),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels, descending to 0.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, steps: int, denoise: float, grid: GridName = "trained", timesteps: str = ""
    ) -> io.NodeOutput:
        """The noise levels of :func:`~.few_step.flash_grid`."""
        chosen = flash_grid(model, steps, denoise, grid, timesteps)
        show_text(cls, chosen.text)
        return io.NodeOutput(chosen.sigmas)


class FlashSamplerSelect(io.ComfyNode):
    """The few-step sampler as SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashSamplerSelect",
            display_name="Flash Sampler Select",
            search_aliases=["few-step sampler", "lcm sampler", "ksampler select", "stochastic sampler"],
            description="The few-step sampler for SamplerCustomAdvanced: predict the picture, add fresh noise, again.",
            inputs=[stochasticity_input()],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="Connect SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, stochasticity: float) -> io.NodeOutput:
        """The sampler of :func:`~.few_step.flash_sampler`."""
        return io.NodeOutput(flash_sampler(stochasticity))
