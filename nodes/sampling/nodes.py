"""Sampling with a few-step model: all in one, or as SIGMAS and SAMPLER for ComfyUI's custom sampling."""

from __future__ import annotations

import functools
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..shared.inputs import (
    GridName,
    check_guidance,
    denoise_input,
    fixed_latent,
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
