"""Flash Adapter Apply: a ControlNet or T2I-adapter on a prompt, from a first to a last step."""

from __future__ import annotations

import functools
import math
from typing import Any

import folder_paths
from comfy.controlnet import ControlBase, T2IAdapter
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.presets import MAX_STEPS
from ..sampling.few_step import FlashGrid, flash_grid, listed
from ..shared.inputs import (
    AUTO,
    NONE,
    GridName,
    chosen_file,
    denoise_input,
    files_fingerprint,
    grid_inputs,
    preset_input,
    steps_input,
)
from ..shared.schema import advanced, count, node_schema, show_text
from .files import load_adapter
from .match import check_adapter

BISECTIONS = 60  # halvings of 0..1: beyond a float's precision


def percent_of_sigma(sampling: Any, sigma: float) -> float:
    """Return the percent in 0..1 of a noise level: the inverse of ``model_sampling.percent_to_sigma``.

    This function differs from model to model, but always descends, so bisection finds the percent.
    """
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def step_window(model: ModelPatcher, grid: FlashGrid, start_step: int, end_step: int) -> tuple[float, float]:
    """Return ComfyUI's start and end percent for a range of steps.

    ComfyUI tests ``sigma(end) <= sigma <= sigma(start)``. Both ends lie halfway (in log sigma) between two steps, so
    that rounding cannot move a step out of the range.

    Args:
        model: the MODEL.
        grid: its timesteps.
        start_step: the first step, from 1.
        end_step: the last step (included); a number beyond the run means the run's last step.

    Raises:
        ValueError: there is no step in the range.
    """
    last = len(grid.timesteps)
    if start_step > last:
        raise ValueError(
            f"start_step is {start_step}, but this run has {count(last, 'evaluation')}: the adapter would never be "
            f"used. Set start_step to a number from 1 to {last}. Set steps and denoise as at the sampler."
        )
    if end_step < start_step:
        raise ValueError(
            f"end_step is {end_step}, but start_step is {start_step}: the adapter would never be used. Set end_step to "
            f"{start_step} or more. To leave the adapter out, set strength to 0."
        )
    sampling = model.get_model_object("model_sampling")
    sigmas = grid.sigmas.tolist()

    def before(step: int) -> float:
        return percent_of_sigma(sampling, math.sqrt(sigmas[step - 2] * sigmas[step - 1]))

    return (0.0 if start_step == 1 else before(start_step), 1.0 if end_step >= last else before(end_step + 1))


def make_hint(image: Tensor, channels: int) -> Tensor:
    """Convert a picture to a hint for ComfyUI's control objects: (B, channels, H, W) in [0, 1].

    Args:
        image: (B, H, W, C) with 1, 3 or 4 channels (transparency is dropped), or a mask (B, H, W).
        channels: of the adapter's input, 1 or 3.

    Raises:
        ValueError: another shape, or NaN or infinite values.
    """
    if image.ndim == 3:
        image = image[..., None]
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(
            f"The hint has the shape {tuple(image.shape)}; expected pictures as (batch, height, width, channels) with "
            "1, 3 or 4 channels. Connect the IMAGE of a preprocessor such as Canny."
        )
    if not bool(image.isfinite().all()):
        raise ValueError(
            "The hint has NaN or infinite pixels; expected finite numbers. Check the preprocessor's output."
        )
    hint = image[..., :3].movedim(-1, 1)
    if channels == 1:
        return hint.mean(1, keepdim=True)
    return hint.expand(-1, 3, -1, -1) if hint.shape[1] == 1 else hint


def hint_channels(control: ControlBase) -> int:
    """Return how many channels of a hint the adapter reads: 1, or 3 if the adapter does not say."""
    if isinstance(control, T2IAdapter):
        return 1 if control.channels_in == 1 else 3
    first = getattr(getattr(control, "control_model", None), "input_hint_block", [None])[0]
    return 1 if getattr(first, "in_channels", 3) == 1 else 3


def attach(
    conditioning: list[Any], control: ControlBase, attached: dict[int, ControlBase], to_negative: bool
) -> list[Any]:
    """Add the adapter to a conditioning, after the adapters that the conditioning already has.

    Args:
        conditioning: does not change.
        control: with its hint; copies of it are added.
        attached: cache {id of the previous control: new control}. So prompts that share a control share the new one
            too, and ComfyUI evaluates them together.
        to_negative: let ComfyUI apply the adapter also to a negative prompt that has no adapter.
    """
    outcome = []
    for embedding, extras in conditioning:
        previous = extras.get("control")
        if id(previous) not in attached:
            attached[id(previous)] = control.copy().set_previous_controlnet(previous)
        added = {"control": attached[id(previous)], "control_apply_to_uncond": to_negative}
        outcome.append([embedding, {**extras, **added}])
    return outcome


class FlashAdapterApply(io.ComfyNode):
    """Add a ControlNet or T2I-adapter to a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="conditioning",
            node_id="FlashAdapterApply",
            display_name="Flash Adapter Apply",
            search_aliases=["controlnet", "apply controlnet", "t2i-adapter", "canny", "depth", "flash diffusion"],
            description="Control a few-step model with a ControlNet or T2I-adapter, from a first to a last step.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample, with its Flash LoRA."),
                io.Conditioning.Input("positive", tooltip="The prompt. Adapters that are already on it stay."),
                io.Image.Input(
                    "image",
                    tooltip="The hint (edges, depth, a pose), in the picture's shape: one for the whole batch, or one "
                    "for each picture.",
                ),
                io.Combo.Input(
                    "adapter_name",
                    options=[NONE, *folder_paths.get_filename_list("controlnet")],
                    tooltip="A .safetensors file from models/controlnet, or an adapter of the demo. Choose none if "
                    "control_net is connected.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.01,
                    tooltip="0 leaves the prompt unchanged. ControlNets are trained at 1; the paper uses 0.8 for the "
                    "SDXL canny adapter. Lower it if the hint shows too much.",
                ),
                steps_input(),
                io.Int.Input("start_step", default=1, min=1, max=MAX_STEPS, tooltip="The first step with the adapter."),
                io.Int.Input(
                    "end_step",
                    default=MAX_STEPS,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="The last step with the adapter; a number beyond the run means the last step. Lower it to "
                    "leave the details to the model: 1 or 2 of 4 often suffice.",
                ),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="A loaded ControlNet or T2I-adapter, instead of adapter_name. Use it to keep a large one "
                    "in memory while you try strengths.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt, for guidance above 1. It gets the adapter too.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Only for ControlNets that read latents, such as those of SD3 and Flux.",
                ),
                denoise_input(
                    functools.partial(advanced, io.Float.Input),
                    tooltip="Set it as at the sampler. Below 1 the run has fewer steps, still counted from 1.",
                    optional=True,
                ),
                *grid_inputs(),
                preset_input(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the adapter."),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The negative prompt with the adapter; empty if negative is not connected.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **_: object) -> str:
        """Change when the file was replaced."""
        return files_fingerprint("controlnet", [adapter_name])

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        image: Tensor,
        adapter_name: str,
        strength: float,
        steps: int,
        start_step: int,
        end_step: int,
        control_net: ControlBase | None = None,
        negative: list[Any] | None = None,
        vae: VAE | None = None,
        denoise: float = 1.0,
        grid: GridName = "trained",
        timesteps: str = "",
        preset: str = AUTO,
    ) -> io.NodeOutput:
        """Check everything, then add the adapter; at strength 0 the prompts stay unchanged."""
        if (control_net is None) == (adapter_name == NONE):
            raise ValueError(
                "There is no adapter. Choose a file under adapter_name, or connect control_net."
                if control_net is None
                else f"There are two adapters: {adapter_name}, and the one at control_net. Set adapter_name to "
                f"'{NONE}', or disconnect control_net. To use both, use this node twice."
            )
        chosen = flash_grid(model, steps, denoise, grid, timesteps, preset)
        window = step_window(model, chosen, start_step, end_step)
        if control_net is None:
            control = load_adapter(chosen_file("controlnet", adapter_name, "adapter"), model)
            name = adapter_name
        else:
            control, name = control_net, "The adapter at control_net"
        kind = check_adapter(control, model, name)
        hint = make_hint(image, hint_channels(control))
        if control.latent_format is not None and vae is None:
            raise ValueError(f"{name} reads its hint as a latent, so it needs a VAE. Connect the model's VAE to 'vae'.")
        last = min(end_step, len(chosen.timesteps))
        steered = listed(chosen.timesteps[start_step - 1 : last])
        show_text(
            cls, f"{kind}: steps {start_step} to {last} of {len(chosen.timesteps)} (t = {steered}), x {strength:g}"
        )
        if strength == 0:
            return io.NodeOutput(positive, negative)
        prepared = control.copy().set_cond_hint(hint, strength, window, vae=vae)
        attached: dict[int, ControlBase] = {}
        return io.NodeOutput(
            attach(positive, prepared, attached, to_negative=negative is None),
            None if negative is None else attach(negative, prepared, attached, to_negative=False),
        )
