"""``flash-diffusion demo card``: draw every subject, measure the pictures, and write the teacher's model card."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ....files import write_text_whole, write_whole
from ....metrics.feature_network import FeatureNetwork
from ....pictures import tile_grid
from ...assets import FEATURES, TEACHER
from ...shards import SIZE, TEACHER_STYLE, load_pictures
from ..autoencoder import held_out
from ..features import accuracy
from ..patch_pca import PatchPCA, psnr
from .training import TRAINING_FILE, v_loss

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor

logger = logging.getLogger(__name__)

STEPS, GUIDANCE = 32, 2.0
GRID_COLUMNS, GRID_ROWS = 15, 10
GRID_TILE = 96  # pixels

TEMPLATE = Path(__file__).with_name("card_template.md")
RENDITIONS = {  # the measurements of `features.report`, in words
    "augmented": "under fresh augmentation",
    "autoencoder": "in the autoencoder's reconstruction",
    "unseen_style": "in a style it never saw (Fluent Emoji Flat)",
}


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], guidance: float, seed: int = 0) -> Tensor:
    """Draw one picture per prompt: (N, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for start in range(0, len(prompts), 16):
        images = pipeline(
            prompts[start : start + 16],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
        ).images
        drawn.append(images)
    return torch.cat(drawn)


@torch.no_grad()
def reconstruct(pipeline: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Encode and decode images (N, 3, H, W) in [0, 1]."""
    latents = [pipeline.vae.encode(2 * batch - 1).latent_dist.mean for batch in images.split(16)]
    return torch.cat([pipeline.vae.decode(batch).sample / 2 + 0.5 for batch in latents]).clamp(0, 1)


def write_card(teacher: Path = TEACHER, features: Path = FEATURES) -> dict[str, float]:
    """Draw, measure, write `README.md` and `grid.webp` into `teacher`, and return the card's figures."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    network = FeatureNetwork.from_pretrained(features)
    pictures, other = load_pictures(TEACHER_STYLE), load_pictures("noto")
    images, names = pictures.images / 255, [caption.name for caption in pictures.captions]
    unseen = other.images[held_out(other)] / 255
    code = PatchPCA.load()

    drawn = draw(pipeline, names, GUIDANCE)
    grid = tile_grid(drawn, GRID_COLUMNS, GRID_TILE)
    write_whole(teacher / "grid.webp", lambda partial: grid.save(partial, "WEBP", quality=85, method=6))
    config = json.loads((features / "config.json").read_text())
    training = json.loads((teacher / TRAINING_FILE).read_text())
    millions = {
        part: sum(parameter.numel() for parameter in getattr(pipeline, module).parameters()) / 1e6
        for part, module in (("vae", "vae"), ("text", "text_encoder"), ("unet", "unet"))
    }
    losses = v_loss(pipeline.unet, pipeline.text_encoder, pipeline.tokenizer, pictures)
    figures = {
        "right": accuracy(network, drawn, names),
        "right_unguided": accuracy(network, draw(pipeline, names, 1.0), names),
        "ceiling": accuracy(network, images, names),
        "psnr_teacher": psnr(reconstruct(pipeline, images), images).mean().item(),
        "psnr_held_out": psnr(reconstruct(pipeline, unseen), unseen).mean().item(),
        "psnr_linear": psnr(code.decode(code.encode(images)).clamp(0, 1), images).mean().item(),
    }
    card = TEMPLATE.read_text(encoding="utf-8").format(
        size=SIZE,
        steps=STEPS,
        guidance=GUIDANCE,
        general=", ".join(f'"{caption}"' for caption in sorted({caption.general for caption in pictures.captions})),
        held_out=len(unseen),
        recognised=", ".join(f"{share:.1%} {RENDITIONS[kind]}" for kind, share in config["accuracy"].items()),
        features=sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        latent_channels=pipeline.vae.config.latent_channels,
        vocabulary=len(pipeline.tokenizer),
        epochs=training["updates"] * training["batch_size"] // training["pictures"],
        minutes=training["seconds"] / 60,
        losses=", ".join(f"{loss:.3f}" for loss in losses),
        **{name: training[name] for name in ("updates", "batch_size", "pictures")},
        **millions,
        **figures,
    )
    write_text_whole(teacher / "README.md", card)
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion demo card`."""
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="folder of the teacher (default: the demo's own)")


def run(args: argparse.Namespace) -> int:
    """Draw every subject, measure, and write the model card."""
    figures = write_card(args.teacher)
    logger.info("%s", "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return 0
