"""LoRA files for the tests, made on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict

from flash_diffusion.flash_core.lora import FlashMetadata, LoraModule, flat_name, write_lora

# What the demo's recipes adapt: attention, projections, feed-forward layers and convolutions.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
TARGETS += ["conv1", "conv2", "time_emb_proj", "conv_shortcut"]
TIMESTEPS = {1: (999.0,), 2: (999.0, 499.0), 4: (999.0, 749.0, 499.0, 249.0)}


def save_random_lora(
    path: Path,
    teacher: Path,
    rank: int = 4,
    alpha: float = 6.0,
    stochasticity: Mapping[int, float] | None = None,
) -> None:
    """Save a Flash LoRA in PEFT's format for the teacher's UNet; its random weights visibly change the pictures."""
    unet = UNet2DConditionModel.from_pretrained(teacher / "unet")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False))
    generator = torch.Generator().manual_seed(3)
    weights = get_peft_model_state_dict(unet)
    modules = {}
    for key in weights:
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            down, up = weights[key], weights[f"{layer}.lora_B.weight"]
            random = [torch.randn(half.shape, generator=generator) * 0.07 for half in (down, up)]
            modules[flat_name(layer)] = LoraModule(layer, *random, alpha)
    metadata = FlashMetadata(
        base="flash-demo",
        prediction="v_prediction",
        process="vp",
        timesteps=TIMESTEPS,
        stochasticity=stochasticity or {},
    )
    write_lora(path, modules, metadata)


def save_sd15_lora(path: Path) -> None:
    """Save a few layers of a LoRA for Stable Diffusion 1.5, without metadata, like most published files."""
    generator = torch.Generator().manual_seed(4)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0"
    shapes = {f"{layer}.attn1.to_q": (640, 640), f"{layer}.attn2.to_k": (768, 640), f"{layer}.attn2.to_v": (768, 640)}
    tensors = {}
    for name, (inputs, outputs) in shapes.items():
        key = f"lora_unet_{flat_name(name)}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, inputs, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    from safetensors.torch import save_file

    save_file(tensors, path)
