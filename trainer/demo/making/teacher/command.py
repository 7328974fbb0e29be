"""``flash-diffusion demo teacher``: train the demo's teacher and export it in diffusers' layout."""

from __future__ import annotations

import argparse
import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ....files import replace_folder, write_text_whole
from ...assets import ROOT, TEACHER
from ...shards import Pictures, load_pictures
from .architecture import build_scheduler, build_text_encoder, build_unet, train_tokenizer
from .training import TRAINING_FILE, Trainer, TrainingSet, train

logger = logging.getLogger(__name__)

CHECKPOINT = ROOT.parents[1] / "out" / "demo-teacher" / "checkpoint.safetensors"


def export(trainer: Trainer, folder: Path = TEACHER, scheduler: DDIMScheduler | None = None) -> None:
    """Write the averaged UNet and text encoder in half precision, and the scheduler, in diffusers' layout.

    The tokenizer is already in `folder`; `flash-diffusion demo autoencoder` writes the autoencoder. Each part appears
    by a rename, so that a reader never meets half a file.
    """
    model = copy.deepcopy(trainer.model).cpu()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(trainer.average.tensors[name])
    unet = model["unet"]
    assert isinstance(unet, UNet2DConditionModel)
    unet.register_to_config(_name_or_path="")  # or it would publish the folder it was resumed from
    for part in ("unet", "text_encoder"):
        # torch's overloads of Module.to lack memory_format.
        half = model[part].half().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        replace_folder(folder / part, half.save_pretrained)
    replace_folder(folder / "scheduler", (scheduler or build_scheduler()).save_pretrained)
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
    write_text_whole(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    training = {
        "updates": trainer.earlier_steps + trainer.step,
        "seconds": round(trainer.seconds),
        "batch_size": trainer.batch_size,
        "pictures": len(trainer.data.latents),
    }
    write_text_whole(folder / TRAINING_FILE, json.dumps(training, indent=2) + "\n")


@dataclass(frozen=True)
class Start:
    """The start of a training: UNet and text encoder in single precision, and the tokenizer."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def shipped(folder: Path = TEACHER) -> Start:
    """Return the exported teacher in `folder`.

    Raises:
        FileNotFoundError: there is no teacher in `folder`.
    """
    if not (folder / "unet").is_dir():
        raise FileNotFoundError(
            f"there is no teacher in {folder} to resume from; name its folder with --output, or train without --resume"
        )
    return Start(
        UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )


def fresh(pictures: Pictures, folder: Path, seed: int) -> Start:
    """Return an untrained teacher, and write a tokenizer learnt from the pictures' captions into `folder`."""
    texts = [text for caption in pictures.captions for text in (caption.name, caption.general, caption.category)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer")
    torch.manual_seed(seed)
    return Start(build_unet(), build_text_encoder(tokenizer), tokenizer)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion demo teacher`."""
    parser.add_argument(
        "--updates",
        type=int,
        default=7500,
        help="updates in all, those of the checkpoint included (default: %(default)s; 0 only exports)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoint, or without one from the weights in --output",
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="checkpoint file, written every few minutes"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=TEACHER,
        help="folder to export to, in diffusers' layout (default: the demo's own)",
    )
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, mps (default: %(default)s)")
    parser.add_argument(
        "--bf16", action="store_true", help="bfloat16 autocast; faster only on devices that compute in it"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="pictures of an update (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="largest learning rate (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, with a checkpoint every few minutes, and export the result."""
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
    train(trainer, args.checkpoint, args.updates)
    trainer.save(args.checkpoint)
    export(trainer, args.output)
    return 0
