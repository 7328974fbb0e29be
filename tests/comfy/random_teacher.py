"""A teacher with random weights in the demo's layout: small and quick; training cannot hide a mistake."""

from __future__ import annotations

from pathlib import Path

import torch

PROMPTS = ("a red apple", "smiling face with sunglasses", "", "cat, sitting; a very long caption about nothing at all")


def save_random_teacher(folder: Path) -> None:
    """Write a diffusers ``StableDiffusionPipeline`` of the demo's architecture with random weights, in fp16."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    from flash_diffusion.trainer.demo.making.teacher import architecture

    torch.manual_seed(0)
    tokenizer = architecture.train_tokenizer(list(PROMPTS) * 4, folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=architecture.TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=32,
        sample_size=128,
        scaling_factor=0.7,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=architecture.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=architecture.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
