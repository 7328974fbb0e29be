"""Load files of ControlNets and T2I-adapters as ComfyUI's control objects.

ComfyUI's own loader reads diffusers' layout only for T2I-adapters with Stable Diffusion's four levels, and only for
ControlNets of published sizes. Here both are built with the sizes in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..shared.model_facts import family_name
from .control_lora import BaseControlLora, check_control_lora
from .match import adapter_places, is_xl_unshuffle

LATENT_RATIO = 8  # pixels for each latent position, in every UNet with adapters
LONGEST_REASON = 240  # characters; the error of a state dict that does not fit is pages long
DIFFUSERS_T2I = "adapter.body.0.resnets.0.block1.weight"
DIFFUSERS_CONTROLNET = "controlnet_cond_embedding.conv_in.weight"


def load_adapter(path: str, model: ModelPatcher) -> comfy.controlnet.ControlBase:
    """Load a ControlNet or T2I-adapter, still without a hint.

    Args:
        path: a .safetensors file in the layout of diffusers or of the original repositories, or a Control-LoRA.
        model: the MODEL to control. It gives the number of attention heads, which no weight shows. If the file holds
            differences to a model's weights, they are added to this model's weights.

    Raises:
        ValueError: another kind of file, or a broken one.
    """
    name = os.path.basename(path)
    if not path.lower().endswith((".safetensors", ".sft")):
        raise ValueError(
            f"{name} is not a .safetensors file. Other kinds of files can run a program when they are loaded, so they "
            "are not opened. Download the .safetensors version of this adapter, or convert the file."
        )
    outline = read_outline(path)
    if DIFFUSERS_T2I in outline:
        return t2i_adapter(read_weights(path), model, name)
    if DIFFUSERS_CONTROLNET in outline and comfy.model_detection.unet_config_from_diffusers_unet(outline) is None:
        return unet_controlnet(read_weights(path), model, name)
    reason = "it does not know these weights"
    try:
        control = comfy.controlnet.load_controlnet(path, model)
        if isinstance(control, comfy.controlnet.ControlLora):
            check_control_lora(control.control_weights)
            control = BaseControlLora(control.control_weights, control.global_average_pooling)
    except torch.cuda.OutOfMemoryError:
        raise  # also a RuntimeError, but the file is not the cause
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError) as error:
        control, reason = None, _shortened(error)
    if control is None:
        first = ", ".join(sorted(outline)[:3])
        raise ValueError(
            f"{name} is no ControlNet or T2I-adapter that ComfyUI can read ({reason}); its first weights are {first}. "
            "Load a LoRA with Flash LoRA Loader, a whole model with Load Checkpoint or Load Diffusion Model."
        )
    return control


def _shortened(error: Exception) -> str:
    """Return an exception's text on one line, cut after :data:`LONGEST_REASON` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."


def read_outline(path: str) -> dict[str, Tensor]:
    """Read the shapes in a safetensors file, as tensors without data."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{os.path.basename(path)} is broken, or is no safetensors file ({error}). Download it again."
        ) from error


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the file's tensors."""
    weights: dict[str, Tensor] = comfy.utils.load_torch_file(path, safe_load=True)
    return weights


class Residual(nn.Module):
    """``x + convolution(relu(convolution(x)))`` on (B, C, H, W)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.block2(torch.relu(self.block1(x)))
        return x + change


class Stage(nn.Module):
    """One level of a T2I-adapter; optional convolutions exist only if the file has their weights."""

    def __init__(self, weights: Mapping[str, Tensor], pool: bool) -> None:
        """Build the level from its weights, with names such as ``resnets.0.block1.weight``."""
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if pool else nn.Identity()
        self.in_conv = _convolution(weights, "in_conv")
        count = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("resnets."))
        channels, kernel = weights["resnets.0.block2.weight"].shape[0], weights["resnets.0.block2.weight"].shape[-1]
        self.resnets = nn.Sequential(*(Residual(channels, kernel) for _ in range(count)))
        self.out_conv = _convolution(weights, "out_conv")

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out_conv(self.resnets(self.in_conv(self.pool(x))))
        return output


def _convolution(weights: Mapping[str, Tensor], name: str) -> nn.Module:
    """Make the convolution ``name`` with the shape of its weight, or an identity if there is no such weight."""
    if f"{name}.weight" not in weights:
        return nn.Identity()
    out_channels, in_channels, kernel, _ = weights[f"{name}.weight"].shape
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


class T2IAdapterNetwork(nn.Module):
    """A T2I-adapter (arXiv 2302.08453) of any size in diffusers' layout: full, full for SDXL, or light.

    Attributes:
        channels: of each feature map.
        xl: True for SDXL's kind: pixel unshuffle by 16, one level is pooled.
        unshuffle_amount: pixel unshuffle factor; ComfyUI rounds the hint's size up to a multiple of it.
        places: for each feature map, the UNet's input block after which it is added; None for the middle block.
    """

    def __init__(self, weights: Mapping[str, Tensor], unet: UNetModel) -> None:
        """Build the network from its weights, with names without diffusers' prefix ``adapter.``."""
        super().__init__()
        body = _split(weights, "body.")
        if set(body) != set(range(len(body))):
            raise ValueError(f"it has the levels {sorted(body)}, expected 0 to {len(body) - 1}")
        read = weights["conv_in.weight"] if "conv_in.weight" in weights else weights["body.0.in_conv.weight"]
        self.xl = is_xl_unshuffle(read.shape[1])
        self.unshuffle_amount = 16 if self.xl else 8
        self.input_channels = read.shape[1] // self.unshuffle_amount**2
        self.unshuffle = nn.PixelUnshuffle(self.unshuffle_amount)
        self.conv_in = _convolution(weights, "conv_in")
        pooled = {2} if self.xl else set(range(1, len(body)))
        self.body = nn.ModuleList(Stage(body[level], level in pooled) for level in sorted(body))
        last = "out_conv.weight" if "out_conv.weight" in body[0] else "resnets.0.block2.weight"
        self.channels = tuple(body[level][last].shape[0] for level in sorted(body))
        self.places = tuple(place.block for place in adapter_places(unet))[: len(self.channels)]
        self.load_state_dict(weights)

    def forward(self, image: Tensor) -> dict[str, list[Tensor | None]]:
        """Map (B, C, H, W) in [0, 1] to feature maps, in lists; ComfyUI's UNet pops one entry at each block."""
        x = self.conv_in(self.unshuffle(image))
        maps = {}
        for place, stage in zip(self.places, self.body, strict=False):
            x = stage(x)
            maps[place] = x
        blocks = max(place for place in self.places if place is not None)
        # For SDXL's kind the list has one more entry, as in ComfyUI's own class: a chain of adapters adds its lists
        # from their beginning, which the UNet reads last.
        blocks += 1 if self.xl else 0
        control: dict[str, list[Tensor | None]] = {"input": [maps.get(index) for index in range(blocks, -1, -1)]}
        return {**control, "middle": [maps[None]]} if None in maps else control


def t2i_adapter(weights: Mapping[str, Tensor], model: ModelPatcher, name: str) -> comfy.controlnet.T2IAdapter:
    """Build a T2I-adapter of any size from diffusers' layout."""
    unet = unet_of(model, name, "T2I-adapter")
    plain = {key.removeprefix("adapter."): value.float() for key, value in weights.items()}
    try:
        network = T2IAdapterNetwork(plain, unet).eval().requires_grad_(False)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{name} looks like a T2I-adapter, but its weights do not fit together ({_shortened(error)}). "
            "Download the file again, or use another file."
        ) from error
    return comfy.controlnet.T2IAdapter(network, network.input_channels, LATENT_RATIO, "nearest-exact")


def unet_of(model: ModelPatcher, name: str, kind: str) -> UNetModel:
    """Return the model's UNet.

    Raises:
        ValueError: the model is a transformer.
    """
    unet = model.get_model_object("diffusion_model")
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"{name} is a {kind} for a UNet (SD 1.5, SD 2, SDXL); the model is {family_name(model)}, a transformer. "
            "Load the checkpoint that the adapter was made for."
        )
    return unet


def unet_controlnet(weights: Mapping[str, Tensor], model: ModelPatcher, name: str) -> comfy.controlnet.ControlNet:
    """Build a ControlNet (arXiv 2302.05543) of any size from diffusers' layout, with the model's attention heads."""
    unet_of(model, name, "ControlNet")
    settings = model.model.model_config.unet_config
    try:
        config = controlnet_config(weights)
        config |= {key: settings.get(key, -1) for key in ("num_heads", "num_head_channels")}
        renamed = controlnet_weights(weights, config)
        network = _build(config, renamed)
        network.load_state_dict(renamed)
    except (RuntimeError, KeyError, IndexError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{name} looks like a ControlNet, but ComfyUI's class cannot load it ({_shortened(error)}). This class "
            "knows ControlNets of Stable Diffusion's kind, with 16, 16, 32, 32, 96, 96 and 256 channels for the hint. "
            "Download the file again, or use another file."
        ) from error
    device, cast = _devices(network.dtype)
    return comfy.controlnet.ControlNet(network.eval().requires_grad_(False), load_device=device, manual_cast_dtype=cast)


def _devices(dtype: torch.dtype) -> tuple[torch.device, torch.dtype | None]:
    device = comfy.model_management.get_torch_device()
    return device, comfy.model_management.unet_manual_cast(dtype, device)


def _build(config: dict[str, Any], weights: Mapping[str, Tensor]) -> comfy.cldm.cldm.ControlNet:
    """Make ComfyUI's class without weights, in the data type that ComfyUI would choose for these weights."""
    dtype = comfy.model_management.unet_dtype(model_params=-1, weight_dtype=comfy.utils.weight_dtype(weights))
    return comfy.cldm.cldm.ControlNet(
        **config,
        dtype=dtype,
        device=comfy.model_management.unet_offload_device(),
        operations=comfy.ops.pick_operations(dtype, _devices(dtype)[1]),
    )


def controlnet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return ComfyUI's arguments for a ControlNet in diffusers' layout, without the number of heads."""
    levels = _split(weights, "down_blocks.")
    widths, layers, depths = [], [], []
    for level in range(len(levels)):
        resnets, attentions = _split(levels[level], "resnets."), _split(levels[level], "attentions.")
        widths.append(resnets[0]["conv1.weight"].shape[0])
        layers.append(len(resnets))
        depths += [len(_split(attentions.get(layer, {}), "transformer_blocks.")) for layer in range(len(resnets))]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"its widths {widths} are not multiples of the first width")
    middle = _split(weights, "mid_block.attentions.").get(0)
    text = first_shape(weights, ".attn2.to_k.weight")
    linear = first_shape(weights, ".proj_in.weight")
    vector = first_shape(weights, "add_embedding.linear_1.weight") or first_shape(
        weights, "class_embedding.linear_1.weight"
    )
    return {
        "image_size": 32,
        "in_channels": weights["conv_in.weight"].shape[1],
        "hint_channels": weights[DIFFUSERS_CONTROLNET].shape[1],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": layers,
        "transformer_depth": depths,
        "transformer_depth_middle": -1 if middle is None else len(_split(middle, "transformer_blocks.")),
        "context_dim": 1 if text is None else text[1],  # not used without attention, but ComfyUI needs a number
        "use_linear_in_transformer": linear is not None and len(linear) == 2,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None if vector is None else vector[1],
        "num_classes": None if vector is None else "sequential",
    }


def controlnet_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a ControlNet's weights from diffusers' names to ComfyUI's."""
    upward = [0] * sum(layers + 1 for layers in config["num_res_blocks"])  # a ControlNet has no up blocks
    depth = max(config["transformer_depth_middle"], 0)
    names = comfy.utils.unet_to_diffusers(
        {**config, "transformer_depth_output": upward, "transformer_depth_middle": depth}
    )
    hints = len(_split(weights, "controlnet_cond_embedding.blocks."))
    for part in ("weight", "bias"):
        names[f"controlnet_mid_block.{part}"] = f"middle_block_out.0.{part}"
        for index in range(len(_split(weights, "controlnet_down_blocks."))):
            names[f"controlnet_down_blocks.{index}.{part}"] = f"zero_convs.{index}.0.{part}"
        # There is a nonlinearity between every two of the hint's convolutions.
        names[f"controlnet_cond_embedding.conv_in.{part}"] = f"input_hint_block.0.{part}"
        for index in range(hints):
            names[f"controlnet_cond_embedding.blocks.{index}.{part}"] = f"input_hint_block.{2 * index + 2}.{part}"
        names[f"controlnet_cond_embedding.conv_out.{part}"] = f"input_hint_block.{2 * hints + 2}.{part}"
    return {names.get(name, name): value for name, value in weights.items()}


def first_shape(weights: Mapping[str, Tensor], ending: str) -> tuple[int, ...] | None:
    """Return the shape of the first weight whose name ends with ``ending``, or None."""
    return next((tuple(value.shape) for name, value in weights.items() if name.endswith(ending)), None)


def _split(weights: Mapping[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    """Group the weights whose names start with ``prefix`` by the number that follows it."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(weights, prefix):
        index, _, rest = name.partition(".")
        parts.setdefault(int(index), {})[rest] = value
    return parts


def _below(weights: Mapping[str, Tensor], prefix: str) -> Iterable[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), value) for name, value in weights.items() if name.startswith(prefix))
