"""Tiny IP-Adapters of the published files' form, and the CLIP vision encoder they read."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE = 32  # pixels
HIDDEN, EMBEDDING = 16, 24  # widths of the encoder's states and of its embedding
LAYERS = 4  # of the resampler
TOKENS = 4  # that the plain adapter makes of an embedding


def save_image_encoder(folder: Path, embedding: int = EMBEDDING) -> Path:
    """A random encoder as a transformers folder."""
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=embedding,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def save_image_adapter(path: Path, unet: UNet2DConditionModel, *, plus: bool = False) -> Path:
    """A random IP-Adapter for a UNet, by the published names: cross-attentions are 1, 3, 5 ... of all attentions.

    Args:
        plus: the kind that reads the encoder's hidden states by a resampler.
    """
    generator = torch.Generator().manual_seed(1)
    width = unet.config["cross_attention_dim"]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    if plus:
        inner, heads = 64, 64  # one head of 64 channels, as everywhere
        tensors = {
            "latents": random(1, TOKENS, inner),
            "proj_in.weight": random(inner, HIDDEN),
            "proj_in.bias": random(inner),
            "proj_out.weight": random(width, inner),
            "proj_out.bias": random(width),
            "norm_out.weight": 1 + random(width),
            "norm_out.bias": random(width),
        }
        for layer in range(LAYERS):
            block = {
                "0.norm1.weight": 1 + random(inner),
                "0.norm1.bias": random(inner),
                "0.norm2.weight": 1 + random(inner),
                "0.norm2.bias": random(inner),
                "0.to_q.weight": random(heads, inner),
                "0.to_kv.weight": random(2 * heads, inner),
                "0.to_out.weight": random(inner, heads),
                "1.0.weight": 1 + random(inner),
                "1.0.bias": random(inner),
                "1.1.weight": random(4 * inner, inner),
                "1.3.weight": random(inner, 4 * inner),
            }
            tensors |= {f"layers.{layer}.{name}": value for name, value in block.items()}
    else:
        tensors = {
            "proj.weight": random(TOKENS * width, EMBEDDING),
            "proj.bias": random(TOKENS * width),
            "norm.weight": 1 + random(width),
            "norm.bias": random(width),
        }
    tensors = {f"image_proj.{name}": value for name, value in tensors.items()}
    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossing):
        own = unet.get_submodule(name.removesuffix(".processor")).to_k.weight
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * index + 1}.{part}.weight"] = random(*own.shape)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path
