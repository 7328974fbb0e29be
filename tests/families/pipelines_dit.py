"""Tiny whole pipelines of the transformer families, as diffusers saves them: every true part, with random weights.

The denoisers are those of :mod:`.networks`; around them stand T5 and CLIP encoders with tokenizers made on the spot, a
VAE and the family's scheduler.
"""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    T5TokenizerFast,
)

from .networks import SPREAD, TEXT_WIDTH, tiny_network
from .pipelines import clip_tokenizer, text_config, tiny_vae

CLIP_WIDTHS = (16, 8)  # of CLIP-L and CLIP-G: together less than T5's, so that they are padded as the true ones are
CLIP_POOLED = (16, 24)
# What the published VAEs say: (scaling_factor, shift_factor).
VAE_FACTORS = {"pixart_alpha": (0.18215, None), "pixart_sigma": (0.13025, None), "sd3": (1.5305, 0.0609)}
VAE_FACTORS["sd35"] = VAE_FACTORS["sd3"]
SENTENCES = ("red ball", "green box", "blue cone", "a yellow star", "grey cloud", "the quick brown fox jumps")


def save_pipeline(family: str, folder: Path, seed: int = 0, *, t5: bool = True) -> Path:
    """A random model of a transformer family as a diffusers folder, float32.

    Args:
        t5: whether an SD3 model has its third text encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family.startswith("pixart"):
            pipeline = _pixart(family, folder, seed)
        else:
            pipeline = _stable_diffusion_3(family, folder, seed, t5)
        pipeline.save_pretrained(folder)
    return folder


def _pixart(family: str, folder: Path, seed: int) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    pipeline = PixArtAlphaPipeline if family == "pixart_alpha" else PixArtSigmaPipeline
    transformer = tiny_network(family, seed)
    if family == "pixart_alpha":
        # The stock pipeline gives size and aspect ratio to models of this sample size and to no others.
        weights = transformer.state_dict()
        transformer = PixArtTransformer2DModel.from_config({**transformer.config, "sample_size": 128}).eval()
        transformer.load_state_dict(weights)
    return pipeline(
        tokenizer=T5Tokenizer.from_pretrained(_sentencepiece(folder), extra_ids=0, legacy=True),
        text_encoder=_text_encoder(),
        vae=_vae(family),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


def _stable_diffusion_3(family: str, folder: Path, seed: int, t5: bool) -> StableDiffusion3Pipeline:
    first, second = clip_tokenizer(folder / "vocabulary" / "0"), clip_tokenizer(folder / "vocabulary" / "1", "!")
    return StableDiffusion3Pipeline(
        transformer=tiny_network(family, seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(family),
        text_encoder=_clip(first, 0),
        tokenizer=first,
        text_encoder_2=_clip(second, 1),
        tokenizer_2=second,
        text_encoder_3=_text_encoder() if t5 else None,
        tokenizer_3=T5TokenizerFast.from_pretrained(_sentencepiece(folder), extra_ids=0, legacy=True) if t5 else None,
    )


def _spread(module: nn.Module) -> nn.Module:
    """Random weights far enough from the usual initial ones that every prompt gets embeddings of its own."""
    with torch.no_grad():
        for value in module.parameters():
            value.add_(5 * SPREAD * torch.randn_like(value))
    return module.eval()


def _vae(family: str) -> AutoencoderKL:
    scaling, shift = VAE_FACTORS[family]
    if family.startswith("pixart"):
        return tiny_vae(scaling)
    return tiny_vae(scaling, shift_factor=shift, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


def _text_encoder() -> T5EncoderModel:
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return _spread(T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")))


def _clip(tokenizer: CLIPTokenizer, index: int) -> CLIPTextModelWithProjection:
    config = text_config(tokenizer, CLIP_WIDTHS[index], ("quick_gelu", "gelu")[index], CLIP_POOLED[index])
    encoder = _spread(CLIPTextModelWithProjection(config))
    if index == 0:  # CLIP-L's is none, say the readers of single files, which leave it out
        nn.init.eye_(encoder.text_projection.weight)
    return encoder


def _sentencepiece(folder: Path) -> Path:
    """Write a sentencepiece model with T5's special tokens; return its folder, which T5's tokenizers read."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="unigram", vocab_size=60,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder
