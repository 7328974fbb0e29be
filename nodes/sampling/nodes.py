"""Sampling with a few-step model: all in one, or as SIGMAS and SAMPLER for ComfyUI's custom sampling."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..shared.inputs import (
    GridName,
    check_guidance,
    check_numbers,
    denoise_input,
    grid_inputs,
    guidance_input,
    negative_input,
    seed_input,
    steps_input,
    stochasticity_input,
)
from ..shared.model_facts import check_prompts
from ..shared.schema import advanced, node_schema, show_text
from .few_step import flash_grid, flash_sampler

PIXART_MINIMUM = 66  # latent height + width from which its position embeddings in ComfyUI do not divide by zero


def fixed_latent(model: ModelPatcher, latent: dict[str, Any]) -> Any:
    """The latent's samples, with an empty latent brought to the model's channels as ComfyUI's own samplers do."""
    sizes = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # spelt so by newer ComfyUI, which alone sets them
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: latent.get(name) for name in sizes if name in known}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    wanted = model.get_model_object("latent_format")
    channels, dimensions = wanted.latent_channels, wanted.latent_dimensions + 2
    if not samples.is_nested and samples.ndim != dimensions:
        raise ValueError(
            f"This latent has {samples.ndim} dimensions; expected {dimensions}: a picture's has 4, a video's 5. "
            "Connect an empty latent of the model's kind, such as Empty Latent Image, or encode with the model's VAE."
        )
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
    if not samples.is_nested:
        check_numbers("This latent", samples)
        if "noise_mask" in latent:
            check_numbers("This latent's noise mask", latent["noise_mask"])
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
                seed_input("The same seed gives the same picture; its first noise is KSampler's at the same seed."),
                steps_input(),
                guidance_input(
                    "Classifier-free guidance (KSampler's cfg). Flash models have it built in: leave it at 1, which "
                    "also needs half the time. Above 1 a negative prompt must be connected."
                ),
                denoise_input(),
                *grid_inputs(),
                stochasticity_input(functools.partial(advanced, io.Float.Input), optional=True),
                negative_input(),
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

        check_guidance(guidance, negative)
        check_prompts(model, positive=positive, negative=negative)
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
