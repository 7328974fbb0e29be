"""Tiny random networks of every family: the true architecture, with less width and depth.

The sizes are those that ComfyUI's classes can take too: widths in multiples of 32 for its group norms, SD3's heads of
64 channels with as many blocks as heads. ``tests/comfy/inside/tiny.py`` makes the same weights a ComfyUI MODEL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

TEXT_WIDTH = 32  # of the token embeddings that cross-attention reads
POOLED_WIDTH = 24  # of the pooled embedding of SDXL
TIME_ID_WIDTH = 8  # SDXL: of each of its six size and crop numbers
SD3_POOLED_WIDTH = 40
SPREAD = 0.02  # added to every weight: a fresh network is nearly linear in its input, and hides errors


def _unet(**fields: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": TEXT_WIDTH,
            "attention_head_dim": 4,  # the number of heads; the name is diffusers' history
            **fields,
        }
    )


def _sd15() -> nn.Module:
    return _unet()


def _sd21() -> nn.Module:
    return _unet(attention_head_dim=(1, 2, 2), use_linear_projection=True)


def _sdxl() -> nn.Module:
    return _unet(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * TIME_ID_WIDTH,
    )


def _pixart(micro_conditioning: bool) -> nn.Module:
    # ComfyUI and diffusers agree on PixArt's position embeddings where the mean of the latent's height and width rounds
    # to the sample size in multiples of 64: compare them on latents of 33 to 95, such as 40 x 48.
    return PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=16,
        cross_attention_dim=96,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
        in_channels=4,
        out_channels=8,
        sample_size=64,
        use_additional_conditions=micro_conditioning,
    )


def _pixart_alpha() -> nn.Module:
    return _pixart(micro_conditioning=True)


def _pixart_sigma() -> nn.Module:
    return _pixart(micro_conditioning=False)


def _sd3(**fields: object) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=64,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=SD3_POOLED_WIDTH,
        pos_embed_max_size=24,
        **fields,
    )


def _sd35() -> nn.Module:
    return _sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=SD3_POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "sd15": _sd15,
    "sd21": _sd21,
    "sdxl": _sdxl,
    "pixart_alpha": _pixart_alpha,
    "pixart_sigma": _pixart_sigma,
    "sd3": _sd3,
    "sd35": _sd35,
    "flux": _flux,
}
FAMILIES = tuple(_NETWORKS)


def tiny_network(family: str, seed: int = 0) -> nn.Module:
    """A diffusers network of the family, float32 on the CPU, in evaluation mode, its weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _NETWORKS[family]()
        with torch.no_grad():
            for value in network.parameters():
                value.add_(SPREAD * torch.randn_like(value))
    return network.eval().requires_grad_(False)
