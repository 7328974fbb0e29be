"""Inputs that several nodes have: their widgets, and the checks of their values."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import comfy.sample
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.presets import MAX_STEPS, PRESETS
from .schema import advanced, count
from .sizes import check_size

MAX_SEED = 2**64 - 1

GridName = Literal["trained", "reference", "custom"]
GRIDS: tuple[GridName, ...] = get_args(GridName)

NONE = "none"  # the choice of no file
AUTO = "auto"  # stochasticity, preset: what the LoRA's metadata or its preset says

STEPS_TOOLTIP = (
    "How often the model is evaluated. 4 is usual; 1 or 2 is faster. Each step count has its own trained timesteps (4 "
    "steps: t = 999, 749, 499, 249); the node shows them after a run. More than 8 only for LoRAs made for them."
)
DENOISE_TOOLTIP = (
    "1 makes a new picture. Below 1 keeps more of the input picture. Rounded to the nearest trained timestep: with 4 "
    "steps .25, .5, .75 and 1 differ."
)
GRID_TOOLTIP = (
    "Which timesteps are evaluated. trained: those of the LoRA's metadata or preset (best). reference: those of the "
    "published diffusers pipelines (999, 759, 499, 259). custom: your list in 'timesteps'."
)
TIMESTEPS_TOOLTIP = (
    "Only for grid 'custom': timesteps from noise to image, such as 999, 749, 499, 249 (0 to 999). SD3 and Flux: 1000 "
    "times the noise level, such as 1000, 900, 750, 500. The list replaces 'steps'."
)
STOCHASTICITY_TOOLTIP = (
    "auto: the best value for the LoRA and this step count, from the LoRA's metadata or preset (without them: 1); the "
    "node shows it after a run. Or a number: 1 adds fresh noise at every step, 0 none (DDIM; Euler for SD3 and Flux)."
)
PRESET_TOOLTIP = (
    "The kind of few-step LoRA in the model: it sets timesteps, noise and shift. auto: what Flash LoRA Loader "
    "recognised, or the LoRA's own metadata. Choose it by hand for a renamed file, or after another loader. The help "
    "lists all presets."
)


def steps_input() -> io.Input:
    """Make the widget for the step count."""
    return io.Int.Input("steps", default=4, min=1, max=MAX_STEPS, tooltip=STEPS_TOOLTIP)


def denoise_input(
    widget: Callable[..., io.Input] = io.Float.Input,
    default: float = 1.0,
    tooltip: str = DENOISE_TOOLTIP,
    **fields: Any,
) -> io.Input:
    """Make the widget for denoise in (0, 1]; ``widget`` is the class to use."""
    return widget("denoise", default=default, min=0.01, max=1.0, step=0.01, round=0.01, tooltip=tooltip, **fields)


def seed_input(tooltip: str) -> io.Input:
    """Make the widget for a seed, with ComfyUI's choice of the next seed after a run."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def guidance_input(tooltip: str) -> io.Input:
    """Make the widget for classifier-free guidance."""
    return io.Float.Input("guidance", default=1.0, min=1.0, max=20.0, step=0.1, round=0.01, tooltip=tooltip)


def negative_input() -> io.Input:
    """Make the slot for a negative prompt."""
    return io.Conditioning.Input("negative", optional=True, tooltip="What to avoid. Used only if guidance is above 1.")


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


def check_unconditional(model: ModelPatcher, negative: object | None) -> None:
    """Raise ValueError where a patch on the model needs a negative prompt at every guidance, and none is connected.

    Such a patch, as Self-Attention Guidance, keeps ComfyUI from leaving out the negative prompt at guidance 1.
    """
    if model.model_options.get("disable_cfg1_optimization") and negative is None:
        raise ValueError(
            "A patch on this model, such as Self-Attention Guidance, works on the negative prompt even at guidance 1, "
            "but 'negative' is not connected. Connect a CLIP Text Encode (its text may be empty) to 'negative', or "
            "remove the patch."
        )


def check_numbers(name: str, values: Tensor) -> None:
    """Raise ValueError where a picture, mask or latent holds NaN or an infinite value."""
    if not bool(values.sum(dtype=torch.float32).isfinite()):  # a sum needs no memory of the values' size
        raise ValueError(
            f"{name} holds NaN or infinite values; expected finite numbers. Check the node that makes it. The usual "
            "cause is a VAE or a model that overflows in half precision: start ComfyUI with --fp32-vae or --force-fp32."
        )


def check_picture(name: str, image: Tensor) -> None:
    """Raise ValueError where an IMAGE is not (B, H, W, 3 or 4)."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        raise ValueError(
            f"{name} has the shape {tuple(image.shape)}; expected (pictures, height, width, channels) with 3 or 4 "
            "channels (RGB or RGBA) and at least one picture. Convert it to RGB."
        )


ONE_OF = {
    "mask": "Convert Mask to Image, ImageFromBatch and Convert Image to Mask",
    "latent": "Latent From Batch",
}


def check_batch(found: int, noun: str, batch: int, other: str) -> None:
    """Raise ValueError where there are neither one nor ``batch`` of an input: ``3 masks for 1 picture``.

    Args:
        found: how many there are.
        noun: "mask", "latent", or a kind of picture.
        batch, other: the number and the kind of the items that they belong to.
    """
    if found in (1, batch):
        return
    one = ONE_OF.get(noun, "ImageFromBatch")
    repeat = "Repeat Latent Batch" if other == "latent" else "RepeatImageBatch"
    advice = f"Choose one {noun} with {one}"
    if batch == 1:
        advice += f", or repeat the {other} with {repeat} (amount {found})"
    raise ValueError(
        f"There are {count(found, noun)} for {count(batch, other)}; expected 1 {noun} for all, or one for each. "
        f"{advice}."
    )


def fixed_latent(model: ModelPatcher, latent: dict[str, Any]) -> Any:
    """Return the latent's samples; an empty latent gets the model's channels, as in ComfyUI's own samplers.

    Raises:
        ValueError: the latent has other dimensions, channels or sides than the model works on, or holds NaN.
    """
    sizes = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # set by newer ComfyUI, in its spelling
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    ratios = {name: latent.get(name) for name in sizes if name in known}
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
    wanted = model.get_model_object("latent_format")
    channels, dimensions = wanted.latent_channels, wanted.latent_dimensions + 2
    if not samples.is_nested and samples.ndim != dimensions:
        raise ValueError(
            f"This latent has {samples.ndim} dimensions; expected {dimensions} (4 for a picture, 5 for a video). "
            "Connect an empty latent of the model's kind, such as Empty Latent Image, or encode with the model's VAE."
        )
    if not samples.is_nested and dimensions == 4:
        check_size(model, *samples.shape[-2:])
    if not samples.is_nested and samples.shape[1] != channels:
        raise ValueError(
            f"This latent has {samples.shape[1]} channels; the model works on {channels}. Encode the picture with the "
            "VAE that belongs to this model."
        )
    if not samples.is_nested:
        check_numbers("This latent", samples)
        if "noise_mask" in latent:
            check_numbers("This latent's noise mask", latent["noise_mask"])
    return samples


def grid_inputs() -> list[io.Input]:
    """Make the widgets for the timesteps; optional, so that API workflows without them run."""
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


def preset_input() -> io.Input:
    """Make the widget for the preset; the last of its node, so that the values of saved workflows keep their places."""
    options = [AUTO, *(preset.title for preset in PRESETS)]
    return io.Combo.Input("preset", options=options, default=AUTO, optional=True, tooltip=PRESET_TOOLTIP)


def stochasticity_input(optional: bool = False, folded: bool = False) -> io.Input:
    """Make the widget for stochasticity: the text ``auto``, or a number. Numbers of other nodes can be connected.

    Before version 0.2 the widget was a number; the numbers of saved workflows go on to work.

    Args:
        folded: True folds it under "advanced" where ComfyUI can.
    """
    build = functools.partial(advanced, io.String.Input) if folded else io.String.Input
    text = build("stochasticity", default=AUTO, optional=optional, tooltip=STOCHASTICITY_TOOLTIP)
    return io.MultiType.Input(text, [io.Float, io.Int], optional=optional)


def read_stochasticity(value: str | float) -> float | None:
    """Return the number of a stochasticity input; None for ``auto``.

    Raises:
        ValueError: the value is neither ``auto`` nor a number of 0 to 1.
    """
    text = str(value).strip().lower()
    if text == AUTO:
        return None
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        told = f"{number:g}" if math.isfinite(number) else repr(value)
        raise ValueError(
            f"stochasticity is {told}; expected auto (the LoRA's own value), or a number from 0 (deterministic) to 1 "
            "(fresh noise at every step). Write auto, or correct the number."
        )
    return number


def strength_input(name: str, tooltip: str, **fields: Any) -> io.Input:
    """Make the widget for a LoRA's strength."""
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.01, round=0.01, tooltip=tooltip, **fields)


def allow_partial_input() -> io.Input:
    """Make the widget that accepts a LoRA of which only some layers fit."""
    return advanced(
        io.Boolean.Input,
        "allow_partial",
        default=False,
        optional=True,
        tooltip="On: load a LoRA although only some of its layers fit this model; the report lists the others. Off: "
        "such a LoRA is an error.",
    )


def chosen_file(folder: str, name: str, noun: str) -> str:
    """Return the path of a file that a widget lists.

    Args:
        folder: ComfyUI's name of the folder, such as ``loras``.
        name: the file's name in the list.
        noun: what the file is, for the error: "LoRA".

    Raises:
        FileNotFoundError: no such file, as in a workflow of another computer.
    """
    path: str | None = folder_paths.get_full_path(folder, name)
    if path is None:
        raise FileNotFoundError(
            f"There is no {noun} {name!r} in models/{folder}. Put the file there and press R to read the list again, "
            f"or choose another {noun}."
        )
    return path


def files_fingerprint(folder: str, names: Iterable[str | None]) -> str:
    """Return the paths and times of the chosen files: ComfyUI runs the node again after a file was replaced.

    Args:
        folder: ComfyUI's name of the folder, such as ``loras``.
        names: "none" is skipped, and so is None: the name of a linked input, which is not known yet.
    """
    paths = [folder_paths.get_full_path_or_raise(folder, name) for name in names if name not in (None, NONE)]
    return " ".join(f"{path} {os.stat(path).st_mtime_ns}" for path in paths)
