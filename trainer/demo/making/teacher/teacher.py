"""The demo's teacher: a latent diffusion model in Stable Diffusion 1.5's shape, its tokenizer and its export.

Architecture and noise are chosen so that stock diffusers and ComfyUI's own UNet, VAE and CLIP code run the weights:
every width is a multiple of 32 (ComfyUI's GroupNorm has 32 groups), widths are integer multiples of the first, the
number of attention heads is fixed, and betas are linear, where the last step's signal-to-noise ratio is 4e-5 and no
special case for zero is needed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from ....files import replace_folder
from ...assets import ROOT, TEACHER
from ...shards import Pictures, load_pictures

if TYPE_CHECKING:
    from .training import Trainer

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16
LATENT_SIZE = 16  # 128 px
TEXT_WIDTH = 128
MAX_TOKENS = 24
VOCABULARY = 1280
CHECKPOINT = ROOT.parents[1] / "out" / "demo-teacher" / "checkpoint.safetensors"
TRAINING_FILE = "training.json"  # how long the exported weights were trained


def build_unet() -> UNet2DConditionModel:
    """The denoiser: 16 x 16 x 16 latents, three levels, attention on the lower two (as SDXL), 6.7 M parameters."""
    return UNet2DConditionModel(
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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder: CLIP's architecture with 2 layers of width 128, trained together with the UNet."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """The noise process, as a sampler: v-prediction, DDPM's linear betas, trailing timesteps from t = 999."""
    return DDIMScheduler(
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


def train_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """Learn a byte-pair vocabulary from captions and write it as `CLIPTokenizer` files into `folder`.

    As in CLIP the vocabulary starts with the 256 bytes and the 256 bytes that end a word, so that any text can be
    written; it ends with the begin and end marks, and the end mark also pads.
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
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = merges[: VOCABULARY - len(tokens) - 2]
    tokens += [merge.replace(" ", "") for merge in merges] + [begin, end]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=end,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        model_max_length=MAX_TOKENS,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids (B, MAX_TOKENS) of texts."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def export(trainer: Trainer, folder: Path = TEACHER) -> None:
    """Write the averaged UNet and text encoder and the scheduler in half precision into `folder`, in diffusers' layout.

    The tokenizer is already there, the autoencoder comes from `autoencoder.py`. Each part replaces its predecessor by a
    rename, so that a reader never meets half a file.
    """
    model = copy.deepcopy(trainer.model).cpu()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(trainer.average[name])
    model["unet"].register_to_config(_name_or_path="")  # or it would publish the folder it was resumed from
    for part in ("unet", "text_encoder"):
        replace_folder(folder / part, model[part].half().to(memory_format=torch.contiguous_format).save_pretrained)
    replace_folder(folder / "scheduler", build_scheduler().save_pretrained)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    training = {
        "updates": trainer.earlier_steps + trainer.step,
        "seconds": round(trainer.seconds),
        "batch_size": trainer.batch_size,
        "pictures": len(trainer.data.latents),
    }
    (folder / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n")


@dataclass(frozen=True)
class Start:
    """What training starts from: UNet and text encoder in single precision, and the tokenizer."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def shipped(folder: Path = TEACHER) -> Start:
    """An exported teacher.

    Raises:
        FileNotFoundError: there is none in `folder`.
    """
    if not (folder / "unet").is_dir():
        raise FileNotFoundError(
            f"There is no teacher in {folder} to resume from. Name its folder with --output, or train without --resume."
        )
    return Start(
        UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )


def fresh(pictures: Pictures, folder: Path, seed: int) -> Start:
    """An untrained teacher, and a tokenizer learnt from the pictures' captions and written into `folder`."""
    texts = [text for caption in pictures.captions for text in (caption.name, caption.general, caption.category)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer")
    torch.manual_seed(seed)
    return Start(build_unet(), build_text_encoder(tokenizer), tokenizer)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion demo-teacher`."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=90.0, help="length of the run (default: 90; 0 only exports)")
    length.add_argument("--steps", type=int, help="length in updates, counted from the first, instead of minutes")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint or, where there is none, from the shipped weights",
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="written every few minutes")
    parser.add_argument("--output", type=Path, default=TEACHER, help="the diffusers-layout folder to export to")
    parser.add_argument("--device", default="cpu", help="a torch device: cpu, cuda, mps (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; quicker only where the device has it")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures an update (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its height (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, with a checkpoint every few minutes, and export the result."""
    from .training import Trainer, TrainingSet, train

    # Optimiser moments that fade to denormal numbers slow a CPU down tenfold.
    torch.set_flush_denormal(True)
    pictures = load_pictures()
    start = shipped(args.output) if args.resume else fresh(pictures, args.output, args.seed)
    trainer = Trainer(
        start.unet.to(args.device),
        start.text_encoder.to(args.device),
        TrainingSet.of(pictures, start.tokenizer, args.device),
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        bf16=args.bf16,
        seed=args.seed,
    )
    if args.resume and args.checkpoint.is_file():
        trainer.load(args.checkpoint)
    elif args.resume:
        trainer.count_from(args.output)
    millions = sum(value.numel() for value in trainer.parameters.values()) / 1e6
    logger.info("%d pictures, %.2f M parameters, from update %d", len(pictures), millions, trainer.step)
    train(trainer, args.checkpoint, minutes=args.minutes, steps=args.steps)
    trainer.save(args.checkpoint)
    export(trainer, args.output)
    return 0
