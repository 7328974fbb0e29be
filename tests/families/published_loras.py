"""Stand-ins for the published Flash LoRAs: their keys, shapes and types, zeros for their numbers.

The layers are found as the authors' training scripts find them, by the ends of module paths in diffusers' networks of
the published sizes (github.com/gojasper/flash-diffusion, examples/train_flash_*.py). Files of zeros are sparse: they
take no room on a disk.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1", "linear_2")
# name -> rank, targets, alpha, megabytes of the published file
FACTS = {
    "flash-sd": (128, ATTENTION, 128.0, 102),
    "flash-sdxl": (64, ATTENTION, 64.0, 372),
    "flash-pixart": (64, ALL, 8.0, 221),
    "flash-sd3": (64, ALL, 8.0, 351),
}
# Flash PixArt's training code embeds the time, height, width and aspect ratio with modules of its own.
OWN = "adaln_single"
PIXART_RENAMES = {
    f"{OWN}.emb.timestep_embedder": (f"{OWN}.timestep_embedder",),
    f"{OWN}.emb.resolution_embedder": (f"{OWN}.add_embedding.0", f"{OWN}.add_embedding.1"),
    f"{OWN}.emb.aspect_ratio_embedder": (f"{OWN}.add_embedding.2",),
}


def published_network(name: str) -> nn.Module:
    """The base model at its published sizes, without memory."""
    with torch.device("meta"):
        if name == "flash-sd":
            return UNet2DConditionModel(cross_attention_dim=768)
        if name == "flash-sdxl":
            return UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
                use_linear_projection=True,
            )
        if name == "flash-pixart":
            return PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=True)
        return SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )


def published_shapes(name: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each layer's path in the file, with the shapes of its down and up halves."""
    rank, targets, _, _ = FACTS[name]
    shapes = {}
    for path, module in published_network(name).named_modules():
        targeted = path in targets or path.endswith(tuple(f".{end}" for end in targets))
        if not targeted or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        outputs, inputs, *kernel = module.weight.shape
        parent, _, layer = path.rpartition(".")
        for own in PIXART_RENAMES.get(parent, (parent,)):
            down, up = (rank, inputs, *kernel), (outputs, rank, *(1 for _ in kernel))
            shapes[f"{own}.{layer}" if own else layer] = (down, up)
    return shapes


def write_published(name: str, path: Path, *, kohya: bool = False, metadata: dict[str, str] | None = None) -> int:
    """A file as published: diffusers' keys, PEFT's for the transformers; or its twin in kohya's, with alpha.

    Returns:
        The number of its layers.
    """
    _, _, alpha, _ = FACTS[name]
    peft = name in ("flash-pixart", "flash-sd3")
    layers = published_shapes(name)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (down, up) in layers.items():
        if kohya:
            key = f"lora_unet_{layer.replace('.', '_')}"
            shapes[f"{key}.lora_down.weight"], shapes[f"{key}.lora_up.weight"] = down, up
        elif peft:
            key = f"base_model.model.{layer}"
            shapes[f"{key}.lora_A.weight"], shapes[f"{key}.lora_B.weight"] = down, up
        else:
            shapes[f"unet.{layer}.lora.down.weight"], shapes[f"unet.{layer}.lora.up.weight"] = down, up
    alphas = [f"lora_unet_{layer.replace('.', '_')}.alpha" for layer in layers] if kohya else []
    header, place = {}, 0
    for key, shape in [*((key, ()) for key in alphas), *shapes.items()]:
        size = 4 * torch.Size(shape).numel()
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps({"__metadata__": metadata or {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<f", alpha) * len(alphas))
        file.truncate(8 + len(text) + place)
    return len(layers)
