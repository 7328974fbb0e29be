"""The architecture of the demo's teacher: a latent diffusion model in Stable Diffusion 1.5's shape, and its tokenizer.

Stock diffusers and ComfyUI's own UNet, VAE and CLIP code must run the weights. So every width is a multiple of 32
(ComfyUI's GroupNorm has 32 groups) and an integer multiple of the first, and the number of attention heads is fixed.
Betas are linear: the last step's signal-to-noise ratio is 4e-5, so no code needs a special case for zero.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ....files import write_text_whole

LATENT_CHANNELS = 16
LATENT_SIZE = 16  # 128 px
TEXT_WIDTH = 128
MAX_TOKENS = 24
VOCABULARY = 1280


def build_unet() -> UNet2DConditionModel:
    """Return the UNet: 16 x 16 x 16 latents, three levels, attention on the lower two (as SDXL), 6.7 M parameters."""
    unet: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # in diffusers, for historical reasons, this is the NUMBER of heads
        norm_num_groups=32,
    )
    return unet


def build_text_encoder(
    tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH, inner_width: int = 4 * TEXT_WIDTH, max_tokens: int = MAX_TOKENS
) -> CLIPTextModel:
    """Return the text encoder: CLIP's architecture with 2 layers, trained together with the UNet.

    Args:
        width, inner_width: of the tokens, and inside the feed-forward layers.
        max_tokens: of a prompt.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=inner_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max_tokens,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Return the noise process as a sampler: v-prediction, DDPM's linear betas, trailing timesteps from t = 999."""
    scheduler: DDIMScheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect on trailing timesteps; diffusers warns of any other number
    )
    return scheduler


def train_tokenizer(texts: list[str], folder: Path, max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from captions and write it as `CLIPTokenizer` files into `folder`.

    As in CLIP, the vocabulary starts with 256 bytes and 256 bytes that end a word, so that it can write any text. It
    ends with the begin mark and the end mark, and the end mark also pads.
    """
    begin, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    # CLIP's own splitting rule: words, single digits, runs of other signs.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    learner.train_from_iterator(
        [text.lower() for text in texts],
        trainers.BpeTrainer(vocab_size=VOCABULARY, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = merges[: VOCABULARY - len(tokens) - 2]
    tokens += [merge.replace(" ", "") for merge in merges] + [begin, end]
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    write_text_whole(folder / "vocab.json", vocabulary)
    write_text_whole(folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(
        folder,
        unk_token=end,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        model_max_length=max_tokens,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return token ids (B, L) of texts; L is the tokenizer's own length."""
    length = tokenizer.model_max_length
    batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids
