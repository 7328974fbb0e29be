"""Files of ControlNets and T2I-adapters as ComfyUI's control objects, those that ComfyUI's own loader can't read too.

That loader knows T2I-adapters of diffusers' layout for Stable Diffusion's four levels alone, and ControlNets of that
layout at published sizes alone. Here both are built at the sizes that the file has.
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

LATENT_RATIO = 8  # pixels to a latent position, in every UNet with adapters
LONGEST_REASON = 240  # characters; a state dict that does not fit says pages
DIFFUSERS_T2I = "adapter.body.0.resnets.0.block1.weight"
DIFFUSERS_CONTROLNET = "controlnet_cond_embedding.conv_in.weight"


def load_adapter(path: str, model: ModelPatcher) -> comfy.controlnet.ControlBase:
    """A ControlNet or T2I-adapter, without a hint yet.

    Args:
        path: a .safetensors file in the layout of diffusers, of the original repositories, or a Control-LoRA.
        model: what it will steer. Its number of attention heads is taken where no weight tells it; where the file holds
            differences to a model's weights, they are added to this one's.

    Raises:
        ValueError: another kind of file, or one that is broken.
    """
    name = os.path.basename(path)
    if not path.lower().endswith((".safetensors", ".sft")):
        raise ValueError(
            f"{name} is no .safetensors file. Other kinds can hold programs, which loading would run, so they are not "
            "opened. Download the .safetensors version of this adapter, or convert the file."
        )
    outline = read_outline(path)
    if DIFFUSERS_T2I in outline:
        return t2i_adapter(read_weights(path), model, name)
    if DIFFUSERS_CONTROLNET in outline and comfy.model_detection.unet_config_from_diffusers_unet(outline) is None:
        return unet_controlnet(read_weights(path), model, name)
    reason = "it knows no such weights"
    try:
        control = comfy.controlnet.load_controlnet(path, model)
        if isinstance(control, comfy.controlnet.ControlLora):
            check_control_lora(control.control_weights)
            control = BaseControlLora(control.control_weights, control.global_average_pooling)
    except torch.cuda.OutOfMemoryError:
        raise  # a RuntimeError too, but nothing is wrong with the file
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError) as error:
        control, reason = None, _shortened(error)
    if control is None:
        first = ", ".join(sorted(outline)[:3])
        raise ValueError(
            f"{name} is no ControlNet or T2I-adapter that ComfyUI can read ({reason}); its first weights are {first}. "
            "A LoRA belongs into Flash LoRA Loader, a whole model into Load Checkpoint or Load Diffusion Model."
        )
    return control


def _shortened(error: Exception) -> str:
    """What an exception says, on one line, cut off where it is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " ..."


def read_outline(path: str) -> dict[str, Tensor]:
    """The shapes in a safetensors file, as tensors without data."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{os.path.basename(path)} is broken or no safetensors file ({error}). Download it again."
        ) from error


def read_weights(path: str) -> dict[str, Tensor]:
    """The file's tensors."""
    return comfy.utils.load_torch_file(path, safe_load=True)


class Residual(nn.Module):
    """Two convolutions beside a straight path, on (B, C, H, W)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(torch.relu(self.block1(x)))


class Stage(nn.Module):
    """One level of an adapter; its submodules exist where the file has weights for them."""

    def __init__(self, weights: Mapping[str, Tensor], pool: bool) -> None:
        """``weights``: the level's own, by names like ``resnets.0.block1.weight``."""
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if pool else nn.Identity()
        self.in_conv = _convolution(weights, "in_conv")
        count = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("resnets."))
        channels, kernel = weights["resnets.0.block2.weight"].shape[0], weights["resnets.0.block2.weight"].shape[-1]
        self.resnets = nn.Sequential(*(Residual(channels, kernel) for _ in range(count)))
        self.out_conv = _convolution(weights, "out_conv")

    def forward(self, x: Tensor) -> Tensor:
        return self.out_conv(self.resnets(self.in_conv(self.pool(x))))


def _convolution(weights: Mapping[str, Tensor], name: str) -> nn.Module:
    """The convolution of that name, for the shape that its weight has; nothing where there is none."""
    if f"{name}.weight" not in weights:
        return nn.Identity()
    out_channels, in_channels, kernel, _ = weights[f"{name}.weight"].shape
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


class T2IAdapterNetwork(nn.Module):
    """A T2I-adapter (arXiv 2302.08453) of any size in diffusers' layout: full, full for SDXL, or light.

    Attributes:
        channels: of each feature map.
        xl: whether it is of SDXL's kind: pictures unshuffled by 16, and one level pooled.
        unshuffle_amount: pixels on a side that become channels; ComfyUI rounds the hint's size up to it.
        places: for each map the input block after which it is added, None for the middle.
    """

    def __init__(self, weights: Mapping[str, Tensor], unet: UNetModel) -> None:
        """``weights``: names without diffusers' leading ``adapter.``."""
        super().__init__()
        body = _split(weights, "body.")
        if set(body) != set(range(len(body))):
            raise ValueError(f"it has the levels {sorted(body)}")
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
        """(B, C, H, W) in [0, 1] to the maps, in the lists of which ComfyUI's UNet takes the last one at each block."""
        x = self.conv_in(self.unshuffle(image))
        maps = {}
        for place, stage in zip(self.places, self.body, strict=False):
            x = stage(x)
            maps[place] = x
        blocks = max(place for place in self.places if place is not None)
        # SDXL's kind has one more than blocks, as ComfyUI's own class does: in a chain the lists add up from their
        # beginning, which the UNet takes last.
        blocks += 1 if self.xl else 0
        control: dict[str, list[Tensor | None]] = {"input": [maps.get(index) for index in range(blocks, -1, -1)]}
        return {**control, "middle": [maps[None]]} if None in maps else control


def t2i_adapter(weights: Mapping[str, Tensor], model: ModelPatcher, name: str) -> comfy.controlnet.T2IAdapter:
    """A T2I-adapter in diffusers' layout, at any size."""
    unet = unet_of(model, name, "T2I-adapter")
    plain = {key.removeprefix("adapter."): value.float() for key, value in weights.items()}
    try:
        network = T2IAdapterNetwork(plain, unet).eval().requires_grad_(False)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{name} looks like a T2I-adapter, but its weights do not fit together ({_shortened(error)}). "
            "Download the file again, or take another one."
        ) from error
    return comfy.controlnet.T2IAdapter(network, network.input_channels, LATENT_RATIO, "nearest-exact")


def unet_of(model: ModelPatcher, name: str, kind: str) -> UNetModel:
    """The model's UNet.

    Raises:
        ValueError: it is a transformer.
    """
    unet = model.get_model_object("diffusion_model")
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"{name} is a {kind} for a UNet (SD 1.5, SD 2, SDXL); the model is {family_name(model)}, a transformer. "
            "Load the checkpoint that the adapter was made for."
        )
    return unet


def unet_controlnet(weights: Mapping[str, Tensor], model: ModelPatcher, name: str) -> comfy.controlnet.ControlNet:
    """A ControlNet (arXiv 2302.05543) in diffusers' layout, at any size; its heads are the model's."""
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
            f"{name} looks like a ControlNet, but not one that ComfyUI's class can hold ({_shortened(error)}). It "
            "knows those of Stable Diffusion's kind, whose hint goes through 16, 16, 32, 32, 96, 96 and 256 channels. "
            "Download the file again, or take another one."
        ) from error
    device, cast = _devices(network.dtype)
    return comfy.controlnet.ControlNet(network.eval().requires_grad_(False), load_device=device, manual_cast_dtype=cast)


def _devices(dtype: torch.dtype) -> tuple[torch.device, torch.dtype | None]:
    device = comfy.model_management.get_torch_device()
    return device, comfy.model_management.unet_manual_cast(dtype, device)


def _build(config: dict[str, Any], weights: Mapping[str, Tensor]) -> comfy.cldm.cldm.ControlNet:
    """ComfyUI's class, empty, in the type that ComfyUI would choose for these weights."""
    dtype = comfy.model_management.unet_dtype(model_params=-1, weight_dtype=comfy.utils.weight_dtype(weights))
    return comfy.cldm.cldm.ControlNet(
        **config,
        dtype=dtype,
        device=comfy.model_management.unet_offload_device(),
        operations=comfy.ops.pick_operations(dtype, _devices(dtype)[1]),
    )


def controlnet_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """ComfyUI's arguments for a ControlNet, read from diffusers' weights; without those for the heads."""
    levels = _split(weights, "down_blocks.")
    widths, layers, depths = [], [], []
    for level in range(len(levels)):
        resnets, attentions = _split(levels[level], "resnets."), _split(levels[level], "attentions.")
        widths.append(resnets[0]["conv1.weight"].shape[0])
        layers.append(len(resnets))
        depths += [len(_split(attentions.get(layer, {}), "transformer_blocks.")) for layer in range(len(resnets))]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"widths of {widths}, which are no multiples of the first one")
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
        "context_dim": 1 if text is None else text[1],  # of no use without attention, but ComfyUI wants a number
        "use_linear_in_transformer": linear is not None and len(linear) == 2,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None if vector is None else vector[1],
        "num_classes": None if vector is None else "sequential",
    }


def controlnet_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Diffusers' weights of a ControlNet under ComfyUI's names."""
    upward = [0] * sum(layers + 1 for layers in config["num_res_blocks"])  # a ControlNet has no upward half
    depth = max(config["transformer_depth_middle"], 0)
    names = comfy.utils.unet_to_diffusers(
        {**config, "transformer_depth_output": upward, "transformer_depth_middle": depth}
    )
    hints = len(_split(weights, "controlnet_cond_embedding.blocks."))
    for part in ("weight", "bias"):
        names[f"controlnet_mid_block.{part}"] = f"middle_block_out.0.{part}"
        for index in range(len(_split(weights, "controlnet_down_blocks."))):
            names[f"controlnet_down_blocks.{index}.{part}"] = f"zero_convs.{index}.0.{part}"
        # A nonlinearity stands between every two of the hint's convolutions.
        names[f"controlnet_cond_embedding.conv_in.{part}"] = f"input_hint_block.0.{part}"
        for index in range(hints):
            names[f"controlnet_cond_embedding.blocks.{index}.{part}"] = f"input_hint_block.{2 * index + 2}.{part}"
        names[f"controlnet_cond_embedding.conv_out.{part}"] = f"input_hint_block.{2 * hints + 2}.{part}"
    return {names.get(name, name): value for name, value in weights.items()}


def first_shape(weights: Mapping[str, Tensor], ending: str) -> tuple[int, ...] | None:
    """The shape of the first weight whose name ends so, if there is one."""
    return next((tuple(value.shape) for name, value in weights.items() if name.endswith(ending)), None)


def _split(weights: Mapping[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    """The weights below ``prefix``, by the number that follows it."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(weights, prefix):
        index, _, rest = name.partition(".")
        parts.setdefault(int(index), {})[rest] = value
    return parts


def _below(weights: Mapping[str, Tensor], prefix: str) -> Iterable[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), value) for name, value in weights.items() if name.startswith(prefix))
