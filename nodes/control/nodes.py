"""ControlNets and T2I-adapters on a prompt, for few steps: from which to which evaluation, and only where they fit."""

from __future__ import annotations

import functools
import math
import os
from typing import Any

import folder_paths
from comfy.controlnet import ControlBase, T2IAdapter
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.grid import MAX_FEW_STEPS
from ..sampling.few_step import FlashGrid, flash_grid, listed
from ..shared.inputs import GridName, denoise_input, grid_inputs, steps_input
from ..shared.schema import advanced, node_schema, show_text
from .files import load_adapter
from .match import check_adapter

NO_FILE = "none"
BISECTIONS = 60  # halvings of 0..1: beyond a float's precision


def percent_of_sigma(sampling: Any, sigma: float) -> float:
    """Where in 0..1 a ComfyUI ``model_sampling`` puts that noise level: the inverse of its ``percent_to_sigma``.

    That function differs from model to model; all of them descend.
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
    """ComfyUI's start and end in percent for some evaluations of a grid.

    Its test is ``sigma(end) <= sigma <= sigma(start)``, so both ends are put halfway (in log sigma) between two
    evaluations, where no rounding reaches.

    Args:
        start_step: the first one, counted from 1.
        end_step: the last one; beyond the grid's end it is the grid's last.

    Raises:
        ValueError: no evaluation lies between them.
    """
    count = len(grid.timesteps)
    if start_step > count:
        raise ValueError(
            f"start_step is {start_step}, but this run has {count} evaluation{'s' if count > 1 else ''}: the adapter "
            f"would never be used. Set start_step to 1..{count}, and steps and denoise as at the sampler."
        )
    if end_step < start_step:
        raise ValueError(
            f"end_step is {end_step}, before start_step, which is {start_step}: the adapter would never be used. Set "
            f"end_step to {start_step} or more (the last step counts), or strength to 0 to leave it out."
        )
    sampling = model.get_model_object("model_sampling")
    sigmas = grid.sigmas.tolist()

    def before(step: int) -> float:
        return percent_of_sigma(sampling, math.sqrt(sigmas[step - 2] * sigmas[step - 1]))

    return (0.0 if start_step == 1 else before(start_step), 1.0 if end_step >= count else before(end_step + 1))


def make_hint(image: Tensor, channels: int) -> Tensor:
    """The picture as ComfyUI's control objects take it: (B, channels, H, W) in [0, 1].

    Args:
        image: (B, H, W, C) with 1, 3 or 4 channels (a transparency is left out), or a mask (B, H, W).
        channels: what the adapter reads, 1 or 3.

    Raises:
        ValueError: other shapes, or numbers that are none.
    """
    if image.ndim == 3:
        image = image[..., None]
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(
            f"The hint has the shape {tuple(image.shape)}; expected pictures as (batch, height, width, channels) with "
            "1, 3 or 4 channels. Connect the IMAGE of a preprocessor such as Canny."
        )
    if not bool(image.isfinite().all()):
        raise ValueError("The hint has pixels that are no finite numbers. Look at what the preprocessor made.")
    hint = image[..., :3].movedim(-1, 1)
    if channels == 1:
        return hint.mean(1, keepdim=True)
    return hint.expand(-1, 3, -1, -1) if hint.shape[1] == 1 else hint


def hint_channels(control: ControlBase) -> int:
    """How many channels of a hint the adapter reads: 1, or 3 where nothing says otherwise."""
    if isinstance(control, T2IAdapter):
        return 1 if control.channels_in == 1 else 3
    first = getattr(getattr(control, "control_model", None), "input_hint_block", [None])[0]
    return 1 if getattr(first, "in_channels", 3) == 1 else 3


def attach(
    conditioning: list[Any], control: ControlBase, attached: dict[int, ControlBase], to_negative: bool
) -> list[Any]:
    """The conditioning with the adapter added to those that it has already.

    Args:
        control: with its hint; a copy of it is added, nothing is changed in place.
        attached: what was added so far, by what it was added to; prompts that share an adapter go on sharing one, and
            ComfyUI evaluates them together.
        to_negative: whether ComfyUI gives the adapter to a negative prompt that has none of its own.
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
    """A ControlNet or T2I-adapter on a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashAdapterApply",
            display_name="Flash Adapter Apply",
            search_aliases=["controlnet", "apply controlnet", "t2i-adapter", "canny", "depth", "flash diffusion"],
            description="Steers a few-step model with a ControlNet or T2I-adapter, in steps, and refuses one of "
            "another model.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample, with its Flash LoRA."),
                io.Conditioning.Input("positive", tooltip="The prompt; adapters that it has already stay."),
                io.Image.Input(
                    "image",
                    tooltip="The hint: edges, depth, a pose, of the picture's shape. One for all pictures of a batch, "
                    "or one for each.",
                ),
                io.Combo.Input(
                    "adapter_name",
                    options=[NO_FILE, *folder_paths.get_filename_list("controlnet")],
                    tooltip="A .safetensors file from models/controlnet, in diffusers' layout or ComfyUI's, or one "
                    "that ships with the demo; none where control_net is connected.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    round=0.01,
                    tooltip="0 leaves the prompt as it is. 0.8 is the paper's for the SDXL canny adapter; ControlNets "
                    "are trained for 1.",
                ),
                steps_input(),
                io.Int.Input(
                    "start_step", default=1, min=1, max=MAX_FEW_STEPS, tooltip="The first step that it steers."
                ),
                io.Int.Input(
                    "end_step",
                    default=MAX_FEW_STEPS,
                    min=1,
                    max=MAX_FEW_STEPS,
                    tooltip="The last step that it steers. The first steps decide the composition, so 1 or 2 of 4 can "
                    "be enough. Beyond the run's end it is the last one.",
                ),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="A loaded ControlNet or T2I-adapter in place of adapter_name: of another loader, or to "
                    "keep a large one in memory while trying strengths.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="For a guidance above 1: steered like the prompt."
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Only for ControlNets that read latents, as those of SD3 and Flux do."
                ),
                denoise_input(
                    functools.partial(advanced, io.Float.Input),
                    tooltip="As at the sampler. Below 1 it leaves evaluations out; those that it makes are counted "
                    "from 1.",
                    optional=True,
                ),
                *grid_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the adapter."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt with the adapter; empty without one."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str | None, **_: object) -> str:
        """Load again where the file was replaced, as it is after further training."""
        if adapter_name in (None, NO_FILE):
            return ""
        path = folder_paths.get_full_path_or_raise("controlnet", adapter_name)
        return f"{path} {os.stat(path).st_mtime_ns}"

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
    ) -> io.NodeOutput:
        """Check everything, then attach; at strength 0 the prompts go through as they are."""
        if (control_net is None) == (adapter_name == NO_FILE):
            raise ValueError(
                "There is no adapter: choose a file under adapter_name, or connect control_net."
                if control_net is None
                else f"There are two adapters, {adapter_name} and the one connected to control_net. Set adapter_name "
                f"to '{NO_FILE}' or disconnect control_net; for both, use this node twice."
            )
        chosen = flash_grid(model, steps, denoise, grid, timesteps)
        window = step_window(model, chosen, start_step, end_step)
        if control_net is None:
            control = load_adapter(folder_paths.get_full_path_or_raise("controlnet", adapter_name), model)
            name = adapter_name
        else:
            control, name = control_net, "What is connected to control_net"
        kind = check_adapter(control, model, name)
        hint = make_hint(image, hint_channels(control))
        if control.latent_format is not None and vae is None:
            raise ValueError(f"{name} reads its hint as a latent. Connect the model's VAE to vae.")
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
