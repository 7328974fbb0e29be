"""A tiny whole x4 upscaler, as stock diffusers saves it: every true part with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from .networks import SPREAD, TEXT_WIDTH
from .pipelines import clip_tokenizer, text_config, tiny_vae

# The published model's: its denoiser's and its input's noise follow the same betas, which are not Stable Diffusion's.
SCHEDULE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
VAE_SCALE = 0.08333


def tiny_upscaler_network() -> UNet2DConditionModel:
    """7 input channels, the noise level as a class, and levels that attend to the text alone."""
    network = UNet2DConditionModel(
        sample_size=16,
        in_channels=7,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(True, True, False),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        use_linear_projection=True,
        num_class_embeds=1000,
    )
    with torch.no_grad():
        for value in network.parameters():
            value.add_(SPREAD * torch.randn_like(value))
    return network


def save_upscaler(folder: Path, seed: int = 0) -> Path:
    """A random model as a diffusers folder, float32: 16 x 16 latents of 64 px pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "vocabulary", "!")
        StableDiffusionUpscalePipeline(
            vae=tiny_vae(
                VAE_SCALE,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 8),
            ),
            text_encoder=CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, "gelu")),
            tokenizer=tokenizer,
            unet=tiny_upscaler_network(),
            low_res_scheduler=DDPMScheduler(**SCHEDULE),
            scheduler=DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        ).save_pretrained(folder)
    return folder
