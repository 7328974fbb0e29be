"""Flash Sampler, and its parts for ComfyUI's custom sampling: Flash Scheduler and Flash Sampler Select."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..shared.inputs import (
    AUTO,
    GridName,
    check_guidance,
    check_unconditional,
    denoise_input,
    fixed_latent,
    grid_inputs,
    guidance_input,
    negative_input,
    preset_input,
    read_stochasticity,
    seed_input,
    steps_input,
    stochasticity_input,
)
from ..shared.page import text_card
from ..shared.prompts import check_channels, check_prompts
from ..shared.schema import node_schema, show_text
from .few_step import flash_grid, flash_sampler, grid_transitions, text_on_node
from .presets import guidance_warnings, lora_warnings


class FlashSampler(io.ComfyNode):
    """Sample a latent in 1-8 evaluations, from text, an image or a masked image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="sampling",
            node_id="FlashSampler",
            display_name="Flash Sampler",
            search_aliases=[
                "few-step sampler",
                "fast sampler",
                "4 steps",
                "8 steps",
                "ksampler",
                "lcm",
                "turbo",
                "lightning",
                "hyper sd",
                "dmd2",
                "tcd",
                "pcm",
                "euler trailing",
                "flash diffusion",
            ],
            description="Sample a few-step model (Flash, LCM, Lightning, Hyper, DMD2, TCD) at exactly its timesteps.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its Flash LoRA, from Flash LoRA Loader."),
                io.Conditioning.Input("positive", tooltip="The prompt. ControlNets, masks and areas work as usual."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent of the wanted size, or an encoded picture (then lower denoise).",
                ),
                seed_input("The same seed gives the same picture. The first noise is that of KSampler at this seed."),
                steps_input(),
                guidance_input(
                    "Classifier-free guidance (KSampler's cfg). Leave it at 1: few-step models have guidance built in; "
                    "the node warns where the LoRA's preset needs another. Above 1 it needs a negative "
                    "prompt and twice the time."
                ),
                denoise_input(),
                *grid_inputs(),
                stochasticity_input(optional=True, folded=True),
                negative_input(),
                preset_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The finished latent. Connect VAE Decode.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
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
        stochasticity: str | float = AUTO,
        negative: list[Any] | None = None,
        preset: str = AUTO,
    ) -> io.NodeOutput:
        """Sample; the result keeps the input's mask and batch index."""
        import latent_preview  # ComfyUI's; not importable before its server has started

        given = read_stochasticity(stochasticity)
        check_guidance(guidance, negative)
        check_unconditional(model, negative)
        check_prompts(model, positive=positive, negative=negative)
        samples = fixed_latent(model, latent_image)
        check_channels(model, samples.shape, positive=positive, negative=negative)
        noise = comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index"))
        chosen = flash_grid(model, steps, denoise, grid, timesteps, preset)
        fresh = grid_transitions(model, chosen, given)
        warned = guidance_warnings(chosen.preset, steps, guidance, positive)
        warned += lora_warnings(chosen.preset, model, guidance)
        text = text_on_node(chosen.text, fresh, warned)
        show_text(cls, text)
        guider = comfy.samplers.CFGGuider(model)
        conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
        guider.inner_set_conds(conds)
        guider.set_cfg(guidance)
        sampled = guider.sample(
            noise,
            samples,
            flash_sampler(transitions=fresh),
            chosen.sigmas,
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(chosen.timesteps)),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        kept = {key: value for key, value in latent_image.items() if not key.startswith("downscale_ratio_")}
        latent = {**kept, "samples": sampled.to(comfy.model_management.intermediate_device())}
        return io.NodeOutput(latent, ui=text_card(text))


class FlashScheduler(io.ComfyNode):
    """Give the trained noise levels as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="sampling",
            node_id="FlashScheduler",
            display_name="Flash Scheduler",
            search_aliases=["few-step sigmas", "trailing timesteps", "lcm scheduler", "sgm_uniform", "flash diffusion"],
            description="Give the trained noise levels of a few-step (Flash) model to SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("model", tooltip="The model with its Flash LoRA. Its own noise schedule is used."),
                steps_input(),
                denoise_input(),
                *grid_inputs(),
                preset_input(),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas", tooltip="The noise levels, from high to 0. Connect SamplerCustomAdvanced."
                )
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        steps: int,
        denoise: float,
        grid: GridName = "trained",
        timesteps: str = "",
        preset: str = AUTO,
    ) -> io.NodeOutput:
        """Return the noise levels of :func:`~.few_step.flash_grid`."""
        chosen = flash_grid(model, steps, denoise, grid, timesteps, preset)
        show_text(cls, chosen.text)
        return io.NodeOutput(chosen.sigmas, ui=text_card(chosen.text))


class FlashSamplerSelect(io.ComfyNode):
    """Give the few-step sampler as SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="sampling",
            node_id="FlashSamplerSelect",
            display_name="Flash Sampler Select",
            search_aliases=[
                "few-step sampler",
                "lcm sampler",
                "ksampler select",
                "stochastic sampler",
                "flash diffusion",
            ],
            description="Give the few-step sampler to SamplerCustomAdvanced: predict the picture, add fresh noise, "
            "repeat.",
            inputs=[stochasticity_input(), preset_input()],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="Connect SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, stochasticity: str | float, preset: str = AUTO) -> io.NodeOutput:
        """Return the sampler of :func:`~.few_step.flash_sampler`; what ``auto`` means is shown when a run begins."""
        given = read_stochasticity(stochasticity)
        return io.NodeOutput(flash_sampler(given, preset, tell=lambda text: show_text(cls, text)))
