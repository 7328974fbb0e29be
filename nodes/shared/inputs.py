"""Inputs that several nodes have, said once: how a few-step run is set up, and what no node can work with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import comfy.model_base
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.grid import MAX_FEW_STEPS
from .schema import advanced

MAX_SEED = 2**64 - 1
PIXART_MINIMUM = 66  # latent height + width from which its position embeddings in ComfyUI do not divide by zero

GridName = Literal["trained", "reference", "custom"]
GRIDS: tuple[GridName, ...] = get_args(GridName)

STEPS_TOOLTIP = (
    "Model evaluations. Each step count has its own trained timesteps (4: t = 999, 749, 499, 249). They are shown on "
    "the node when it has run."
)
DENOISE_TOOLTIP = (
    "1 makes a new picture, from pure noise; a mask still keeps its part. Below 1 keeps that much of the input latent: "
    "the run starts at the nearest timestep the model was trained on, so few values differ (with 4 steps: .25, .5, "
    ".75, 1)."
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


def denoise_input(
    widget: Callable[..., io.Input] = io.Float.Input,
    default: float = 1.0,
    tooltip: str = DENOISE_TOOLTIP,
    **fields: Any,
) -> io.Input:
    """The widget for how much of a picture is made anew; ``widget`` makes it."""
    return widget("denoise", default=default, min=0.01, max=1.0, step=0.01, round=0.01, tooltip=tooltip, **fields)


def seed_input(tooltip: str) -> io.Input:
    """The widget for a seed, with its control of what follows a run."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def guidance_input(tooltip: str) -> io.Input:
    """The widget for a few-step model's classifier-free guidance."""
    return io.Float.Input("guidance", default=1.0, min=1.0, max=20.0, step=0.1, round=0.01, tooltip=tooltip)


def negative_input() -> io.Input:
    """The slot for a negative prompt that only guidance reads."""
    return io.Conditioning.Input(
        "negative", optional=True, tooltip="What to avoid. Used only where guidance is above 1."
    )


def check_guidance(guidance: float, negative: object | None, name: str = "guidance") -> None:
    """Raise ValueError where guidance is above 1 and no negative prompt is connected.

    Args:
        name: of the input. Default: ``guidance``.
    """
    if guidance > 1 and negative is None:
        raise ValueError(
            f"{name} is {guidance:g}. Above 1 it needs a negative prompt, but 'negative' is not connected. Connect a "
            f"CLIP Text Encode (its text may be empty) to 'negative', or set {name} to 1."
        )


def check_numbers(name: str, values: Tensor) -> None:
    """Raise where a picture, mask or latent holds NaN or an infinite value, which would spread over all of it."""
    if not bool(values.sum(dtype=torch.float32).isfinite()):  # a sum needs no memory of the values' size
        raise ValueError(
            f"{name} holds values that are no numbers (NaN or infinite); expected finite ones. Look at what makes it: "
            "often a VAE or a model that overflows in half precision (start ComfyUI with --fp32-vae, or "
            "--force-fp32)."
        )


def check_picture(name: str, image: Tensor) -> None:
    """Raise where an IMAGE is not (B, H, W, 3 or 4)."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"{name} is {tuple(image.shape)}; expected (pictures, height, width, 3 or 4 channels: RGB or RGBA), at "
            "least one picture. Convert it to RGB."
        )


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
