"""Tiny random models and pictures in the real formats, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

CAPTIONS = ("red ball", "green box", "blue cone", "a yellow star", "grey cloud", "red ball")


def tiny_stable_diffusion(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """A random Stable Diffusion of every true part, 8 x 8 latents of 64 px pictures, as a diffusers folder."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    # A fresh UNet's output is nearly linear in its input; some spread in its weights lets errors show.
    with torch.no_grad():
        for value in unet.parameters():
            value.add_(0.02 * torch.randn_like(value))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    tokenizer = _tokenizer(folder / "vocabulary")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    }
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**{**settings, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with its byte alphabet and no merges."""
    folder.mkdir(parents=True)
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>", model_max_length=16
    )


def picture_folder(folder: Path, count: int = 6, size: int = 64) -> Path:
    """Random pictures with captions beside them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(CAPTIONS[index % len(CAPTIONS)])
    return folder


def tiny_recipe(model: Path, pictures: Path, **fields: Any) -> dict[str, Any]:
    """A recipe that runs in seconds and computes every term."""
    recipe: dict[str, Any] = {
        "model": {"family": "sd15", "path": str(model)},
        "data": {"source": "folder", "path": str(pictures)},
        "lora": {"rank": 4, "alpha": 8},
        "method": {"teacher_steps": 4, "guidance": [1.5, 3.0]},
        "phases": [
            {"name": "warm-up", "updates": 2, "modes": [0, 0, 0.5, 0.5]},
            {"name": "all", "updates": 3, "modes": [0.4, 0.2, 0.2, 0.2], "adversarial": 0.3, "dmd": 0.7},
        ],
        "optimizer": {"lr": 1e-3, "discriminator_lr": 1e-3},
        "batch_size": 2,
        "preview": {"every": 0, "prompts": ["red ball"], "steps": [1]},
        "checkpoint": {"every": 2, "keep": 2},
        "log_every": 1,
    }
    return {**recipe, **fields}
