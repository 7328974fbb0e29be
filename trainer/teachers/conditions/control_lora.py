"""Control-LoRAs: a ControlNet stored as its difference from the base UNet, in one small file.

The differences of layers are low-rank: ``weight + up down``. Layers that the UNet lacks (the hint's encoder, the output
convolutions), norms and biases are whole weights. Names are Stable Diffusion's own. The layout is Stability AI's, which
ComfyUI reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ....flash_core.lora import LoraModule
from ....flash_core.lora.names import unet_path
from ....flash_core.lora.weights import flat_name
from ...errors import UserError
from ...files import write_whole

MARK = "lora_controlnet"  # key of an empty tensor, by which ComfyUI recognises the file
HINT_LAYERS = 8  # convolutions of the hint's encoder; their indices are even, since activations are counted too
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BASIC = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": f"input_hint_block.{2 * (HINT_LAYERS - 1)}",
}


def diffusers_path(layer: str, layers_per_block: int) -> str | None:
    """Return diffusers' path of a layer with the native name ``zero_convs.3.0``; None without one."""
    for path, name in _BASIC.items():
        if layer == name:
            return path
    if found := re.fullmatch(r"zero_convs\.(\d+)\.0", layer):
        return f"controlnet_down_blocks.{found[1]}"
    if found := re.fullmatch(r"input_hint_block\.(\d+)", layer):
        return f"controlnet_cond_embedding.blocks.{int(found[1]) // 2 - 1}"
    return unet_path(flat_name(layer), layers_per_block)


def native_path(path: str, layers_per_block: int) -> str:
    """Return the native name of a layer with that diffusers' path: the inverse of :func:`diffusers_path`.

    Raises:
        ValueError: ControlNets have no such layer.
    """
    if path in _BASIC:
        return _BASIC[path]
    kind, *rest = path.split(".")
    if kind == "controlnet_down_blocks":
        return f"zero_convs.{rest[0]}.0"
    if path.startswith("controlnet_cond_embedding.blocks."):
        return f"input_hint_block.{2 * (int(rest[1]) + 1)}"
    if kind == "down_blocks":
        level, part, index, *inner = rest
        first = 1 + int(level) * (layers_per_block + 1)
        if part == "downsamplers":
            return f"input_blocks.{first + layers_per_block}.0.op"
        block = f"input_blocks.{first + int(index)}.{int(part == 'attentions')}"
    elif kind == "mid_block":
        part, index, *inner = rest
        block = f"middle_block.{1 if part == 'attentions' else 2 * int(index)}"
    else:
        raise ValueError(f"ControlNets have no layer {path}")
    layer = ".".join(inner)
    return f"{block}.{layer if part == 'attentions' else _RESNET[layer]}"


@torch.no_grad()
def expanded(weights: Mapping[str, Tensor], unet: UNet2DConditionModel, file: str) -> ControlNetModel:
    """Return the ControlNet of a Control-LoRA, or of a whole ControlNet with native names.

    Args:
        weights: of the file; on the ``meta`` device if ``unet`` is.
        unet: the base; gives the dtype and the device.
        file: the file's name, for messages.

    Raises:
        UserError: the file is for another base, or incomplete.
    """
    layers = unet.config["layers_per_block"]
    hint = weights.get("input_hint_block.0.weight")
    if hint is None or f"input_hint_block.{2 * (HINT_LAYERS - 1)}.weight" not in weights or not isinstance(layers, int):
        raise UserError(
            f"model.control.path: {file} has no encoder for the hint (input_hint_block.*), so it is "
            "incomplete; download it again"
        )
    first = next(unet.parameters())
    with torch.device(first.device):
        network: ControlNetModel = ControlNetModel.from_unet(
            unet, load_weights_from_unet=not first.is_meta, conditioning_channels=hint.shape[1]
        )
    nn.Module.to(network, first.dtype)  # diffusers' own warns of modules to keep in float32, of which there are none
    state = network.state_dict()
    for key in weights:
        layer, _, kind = key.rpartition(".")
        if kind not in ("up", "weight", "bias"):  # ``down`` goes with its ``up``, and the rest are no weights
            continue
        path = diffusers_path(layer, layers)
        target = f"{path}.{'weight' if kind == 'up' else kind}"
        if path is None or target not in state:
            raise UserError(
                f"model.control.path: {file} changes {key}, which the model's UNet does not have; choose "
                "a file made for this model"
            )
        value = weights[key]
        if kind == "up":
            down = weights.get(f"{layer}.down")
            if down is None:
                raise UserError(
                    f"model.control.path: {file} has {key} without {layer}.down, so it is incomplete; download it again"
                )
            value = _product(value, down, state[target])
        if value.numel() != state[target].numel() or len(value) != len(state[target]):
            raise UserError(
                f"model.control.path: {file} is for another base: the shape of {layer} is {tuple(value.shape)}, but "
                f"{tuple(state[target].shape)} in the model; choose a file made for this model"
            )
        value = value.to(first.device, torch.float32).view_as(state[target])
        state[target].copy_(state[target] + value if kind == "up" else value)
    return network


def _product(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """Return the change ``up down`` of a layer's weight; in the file's own shape if it does not fit the layer."""
    flat_up, flat_down = up.float().flatten(1), down.float().flatten(1)
    if flat_up.shape[1] != flat_down.shape[0]:
        return up
    product = flat_up.to(weight.device) @ flat_down.to(weight.device)
    return product.view_as(weight) if product.numel() == weight.numel() else product


def write_control_lora(
    path: Path,
    modules: Mapping[str, LoraModule],
    whole: Mapping[str, Tensor],
    layers_per_block: int,
    header: Mapping[str, str],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a Control-LoRA file, completely or not at all.

    Args:
        modules: low-rank changes, by diffusers' paths; alpha is folded into the up halves.
        whole: whole weights, by diffusers' names.
    """
    tensors: dict[str, Tensor] = {MARK: torch.tensor([])}
    for name, module in modules.items():
        layer = native_path(name, layers_per_block)
        tensors[f"{layer}.up"] = module.up.detach().float() * module.scale
        tensors[f"{layer}.down"] = module.down.detach()
    for name, value in whole.items():
        layer, _, kind = name.rpartition(".")
        tensors[f"{native_path(layer, layers_per_block)}.{kind}"] = value.detach()
    stored = {name: value.to("cpu", dtype).contiguous() for name, value in tensors.items()}
    write_whole(path, lambda partial: save_file(stored, partial, metadata=dict(header)))
