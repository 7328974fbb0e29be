"""Tiny whole pipelines, as stock diffusers saves them: every true part of a family, with random weights.

The denoisers are those of :mod:`.networks`. The UNet families' other parts are here, the transformers' in
:mod:`.pipelines_dit`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .networks import POOLED_WIDTH, tiny_network

UNET_FAMILIES = ("sd15", "sd21", "sdxl")
PROMPT_LENGTH = 16  # tokens, where the true ones have 77
SDXL_TEXT_WIDTHS = (12, 20)  # of CLIP-L and CLIP-G; readers of single files tell them apart by these
# What the published VAEs multiply their latents by.
VAE_SCALES = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025}
# The published schedulers: class, and what differs from the schedule they share.
SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "sd15": (PNDMScheduler, {"skip_prk_steps": True}),
    "sd21": (DDIMScheduler, {"prediction_type": "v_prediction", "clip_sample": False}),
    "sdxl": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
}


def save_pipeline(
    family: str, folder: Path, seed: int = 0, *, unet: UNet2DConditionModel | None = None, **scheduler: Any
) -> Path:
    """A random model as a diffusers folder, float32: 8 x 8 latents of 64 px pictures for UNets.

    Args:
        unet: in place of the family's tiny one. The text encoder is as wide as the text that it reads.
        scheduler: fields of the scheduler's configuration that differ.
    """
    if family not in UNET_FAMILIES:
        from . import pipelines_dit

        return pipelines_dit.save_pipeline(family, folder, seed)
    network = tiny_network(family, seed) if unet is None else unet
    assert isinstance(network, UNet2DConditionModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _pipeline(family, network, folder / "vocabulary", scheduler).save_pretrained(folder)
    return folder


def _pipeline(family: str, unet: UNet2DConditionModel, vocabulary: Path, fields: dict[str, Any]) -> DiffusionPipeline:
    scheduler, published = SCHEDULERS[family]
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    parts = {"vae": tiny_vae(VAE_SCALES[family]), "unet": unet, "scheduler": scheduler(**schedule | published | fields)}
    # SD 2's and SDXL's second tokenizer pad with "!", CLIP's own with the end of the text.
    tokenizer = clip_tokenizer(vocabulary / "0", "!" if family == "sd21" else "<|endoftext|>")
    if family == "sdxl":
        second = clip_tokenizer(vocabulary / "1", "!")
        first_width, second_width = SDXL_TEXT_WIDTHS
        return StableDiffusionXLPipeline(
            **parts,
            tokenizer=tokenizer,
            tokenizer_2=second,
            text_encoder=CLIPTextModel(text_config(tokenizer, first_width, "quick_gelu")),
            text_encoder_2=CLIPTextModelWithProjection(text_config(second, second_width, "gelu", POOLED_WIDTH)),
            add_watermarker=False,
        )
    activation = "gelu" if family == "sd21" else "quick_gelu"
    return StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text_config(tokenizer, unet.config.cross_attention_dim, activation)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def with_older_tokenizers(folder: Path) -> Path:
    """Let the CLIP tokenizers of a saved pipeline be vocab.json and merges.txt; transformers 5 saves tokenizer.json."""
    for number, place in enumerate((folder / "tokenizer", folder / "tokenizer_2")):
        vocabulary = folder / "vocabulary" / str(number)
        if place.is_dir() and vocabulary.is_dir():
            (place / "tokenizer.json").unlink(missing_ok=True)
            for name in ("vocab.json", "merges.txt"):
                shutil.copy(vocabulary / name, place / name)
    return folder


def tiny_vae(scaling_factor: float, **fields: Any) -> AutoencoderKL:
    """An autoencoder of the true shape: 4 levels, 8 pixels a latent pixel."""
    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "latent_channels": 4,
    }
    return AutoencoderKL(norm_num_groups=4, scaling_factor=scaling_factor, **{**shape, **fields})


def text_config(tokenizer: CLIPTokenizer, width: int, activation: str, projection: int = 16) -> CLIPTextConfig:
    """Settings of a CLIP text encoder of three layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=activation,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip_tokenizer(folder: Path, pad_token: str = "<|endoftext|>", length: int = PROMPT_LENGTH) -> CLIPTokenizer:
    """CLIP's tokenizer with its byte alphabet and no merges."""
    folder.mkdir(parents=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=length)
