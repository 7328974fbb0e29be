"""The architecture of the glyph teacher: Stable Diffusion 1.5's shape and noise process, 64 px, 2 M parameters.

The first teacher predicts the velocity at linear betas. This one predicts the noise at SD 1.5's betas, as most
published models do. Its last step keeps a signal-to-noise ratio of 0.0047: starting from pure noise is approximate.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..patch_pca import LATENT_CHANNELS
from ..teacher import architecture
from .fonts import SIZE

LATENT_SIZE = SIZE // 8
TEXT_WIDTH = 64
MAX_TOKENS = 16


def build_unet() -> UNet2DConditionModel:
    """Return the UNet: 8 x 8 x 16 latents, two levels, attention on the lower one, 1.5 M parameters."""
    unet: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # in diffusers, for historical reasons, this is the NUMBER of heads
        norm_num_groups=32,
    )
    return unet


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the text encoder: the first teacher's, with width 64."""
    return architecture.build_text_encoder(tokenizer, TEXT_WIDTH, 2 * TEXT_WIDTH, MAX_TOKENS)


def build_scheduler() -> DDIMScheduler:
    """Return the noise process as a sampler: the first teacher's, with epsilon and SD 1.5's scaled-linear betas."""
    scheduler: DDIMScheduler = DDIMScheduler.from_config(
        architecture.build_scheduler().config,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
    )
    return scheduler


def build_autoencoder() -> AutoencoderKL:
    """Return a stock `AutoencoderKL`, factor 8, 0.5 M parameters, without attention."""
    network: AutoencoderKL = AutoencoderKL(
        block_out_channels=(16, 32, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    return network
