"""Tiny random T2I-adapters and ControlNets as stock diffusers saves them, for tiny UNets with their true layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from .networks import POOLED_WIDTH, TEXT_WIDTH, TIME_ID_WIDTH, tiny_network

# Added to the weights of T2I-adapters, so that they steer about as much as the text does.
ADAPTER_SPREAD = 0.06
# A ControlNet's last convolutions are zero when it is new: of this size it steers about as much as the text.
CONTROL_SPREAD = 0.1


def sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL with its three levels, where :func:`~.networks.tiny_network` has two: its adapters have a map for each and
    one for the middle."""
    return _random(
        seed,
        0.0,
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=(1, 2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * TIME_ID_WIDTH,
        ),
    )


def tiny_unet(family: str, seed: int = 0) -> UNet2DConditionModel:
    """A UNet to steer, of ``sd15`` or ``sdxl``."""
    network = sdxl_unet(seed) if family == "sdxl" else tiny_network(family, seed)
    assert isinstance(network, UNet2DConditionModel)
    return network


def tiny_t2i_adapter(kind: str, seed: int = 0, in_channels: int = 3) -> T2IAdapter:
    """A T2I-adapter for :func:`tiny_unet`.

    Args:
        kind: diffusers' ``full_adapter`` or ``light_adapter`` (SD 1.5), or ``full_adapter_xl``.
    """
    # A light adapter repeats its last number for one level more.
    sizes: dict[str, dict[str, Any]] = {
        "full_adapter": {"channels": [32, 64, 64], "num_res_blocks": 2},
        "light_adapter": {"channels": [32, 64], "num_res_blocks": 2},
        "full_adapter_xl": {"channels": [32, 64, 128, 128], "num_res_blocks": 2, "downscale_factor": 16},
    }
    return _random(seed, ADAPTER_SPREAD, lambda: T2IAdapter(in_channels=in_channels, adapter_type=kind, **sizes[kind]))


def tiny_controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet for the UNet: a copy of its first half, and a random way in and out."""
    network = _random(seed, 0.0, lambda: ControlNetModel.from_unet(unet))
    generator = torch.Generator().manual_seed(seed)
    for part in (network.controlnet_cond_embedding, network.controlnet_down_blocks, network.controlnet_mid_block):
        for value in part.parameters():
            value.add_(CONTROL_SPREAD * torch.randn(value.shape, generator=generator))
    return network


def save_weights(network: nn.Module, path: Path) -> Path:
    """The network's weights, as ``save_pretrained`` names them, in one file."""
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path


def _random(seed: int, spread: float, build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
        with torch.no_grad():
            for value in network.parameters():
                value.add_(spread * torch.randn_like(value))
    return network.eval().requires_grad_(False)
