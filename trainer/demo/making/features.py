"""``flash-diffusion demo features``: train the network that measures the demo's pictures.

The network names the subject of a picture and embeds the picture in 64 numbers. Frechet and kernel distances use the
embedding, prompt accuracy uses the logits. The network learns from every style with strong augmentation, so that it
measures the drawing and not a few pixels.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ....flash_core.runs.schedule import warmup_cosine
from ...metrics.feature_network import FeatureNetwork
from ..assets import FEATURES, TEACHER
from ..shards import TEACHER_STYLE, Pictures, load_pictures
from .patch_pca import PatchPCA

logger = logging.getLogger(__name__)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move, turn, scale, recolour, soften and disturb each of `images` (B, 3, H, W) in [0, 1] at random."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = low + (high - low) * torch.rand(count, *shape, generator=generator)
        return drawn.to(images.device)

    angle, scale = uniform(-0.25, 0.25), uniform(0.85, 1.2)  # radians; above 1 the subject shrinks
    cosine, sine, shift = angle.cos() * scale, angle.sin() * scale, uniform(-0.12, 0.12, 2)
    rows = (torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.3, images.flip(-1), images)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * uniform(0.7, 1.3, 1, 1, 1)
    images = 1 - (1 - images) * uniform(0.8, 1.2, 3, 1, 1)  # the ground stays white
    factor = int(torch.randint(1, 5, (1,), generator=generator))
    if factor > 1:
        soft = F.interpolate(F.avg_pool2d(images, factor), images.shape[-2:], mode="bilinear", align_corners=False)
        images = torch.lerp(images, soft, uniform(0, 1, 1, 1, 1))
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return (images + uniform(0, 0.08, 1, 1, 1) * noise).clamp(0, 1)


def latent_noise(images: Tensor, generator: torch.Generator, level: float = 0.4) -> Tensor:
    """Add noise to the patch-PCA latents of images (B, 3, H, W), as an unfinished diffusion sample has."""
    code = PatchPCA.load()
    latents = code.encode(images.cpu())
    noise = torch.randn(latents.shape, generator=generator)
    amount = level * torch.rand(len(latents), 1, 1, 1, generator=generator)
    return code.decode(latents + amount * noise).clamp(0, 1).to(images.device)


def train(network: FeatureNetwork, pictures: list[Pictures], updates: int, device: str = "cpu", seed: int = 0) -> None:
    """Train the network to classify augmented pictures of all styles, with a cosine learning rate."""
    images = torch.cat([style.images for style in pictures]).to(device)
    subjects = {name: i for i, name in enumerate(network.classes)}
    labels = torch.tensor([subjects[caption.name] for style in pictures for caption in style.captions], device=device)
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(images), (64,), generator=generator).to(device)
        batch = images[index] / 255
        if step % 3 == 0:
            batch = latent_noise(batch, generator)
        return augment(batch, generator), labels[index]

    fit(network.to(device), draw, updates, learning_rate=3e-3)


def fit(
    network: FeatureNetwork, draw: Callable[[int], tuple[Tensor, Tensor]], updates: int, learning_rate: float
) -> None:
    """Train a classifier with a cosine learning rate.

    Args:
        draw: ``step -> (pictures (B, 3, H, W) in [0, 1], classes (B,))``.
        learning_rate: after the warm-up.
    """
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.05)
    for step in range(updates):
        pictures, classes = draw(step)
        _, logits = network(pictures)
        loss = F.cross_entropy(logits, classes, label_smoothing=0.1)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup_cosine(step, step / updates, warmup=50, final=0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            right = (logits.argmax(1) == classes).float().mean()
            logger.info("features: update %d of %d  loss %.3f  right %.2f", step + 1, updates, loss.item(), right)
    network.eval()


@torch.no_grad()
def accuracy(network: FeatureNetwork, images: Tensor, names: list[str]) -> float:
    """Share of `images` (N, 3, H, W) in [0, 1] whose subject the network names rightly."""
    found = torch.cat([network(batch)[1].argmax(1) for batch in images.split(32)]).tolist()
    right: int = sum(network.classes[i] == name for i, name in zip(found, names, strict=True))
    return right / len(names)


def report(network: FeatureNetwork, pictures: Pictures, packages: Path | None) -> dict[str, float]:
    """Return the accuracy on pictures of the teacher's subjects that the network was not trained on.

    The pictures are augmentations with a new seed, the autoencoder's reconstructions and, where the npm packages are
    given, a style that the demo does not have (Fluent flat).
    """
    from diffusers import AutoencoderKL

    network.cpu().eval()
    images, names = pictures.images / 255, [caption.name for caption in pictures.captions]
    figures = {"augmented": accuracy(network, augment(images, torch.Generator().manual_seed(1)), names)}
    vae = AutoencoderKL.from_pretrained(TEACHER / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        latents = [vae.encode(2 * batch - 1).latent_dist.mean for batch in images.split(16)]
        reconstructed = torch.cat([vae.decode(batch).sample for batch in latents])
    figures["autoencoder"] = accuracy(network, (reconstructed / 2 + 0.5).clamp(0, 1), names)
    if packages is not None:
        from .emoji_packages import unseen_style

        flat = {name: image for name, image in unseen_style(packages)}
        known = [name for name in names if name in flat]
        figures["unseen_style"] = accuracy(network, torch.stack([flat[name] for name in known]), known)
    return {name: round(value, 4) for name, value in figures.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion demo features`."""
    parser.add_argument("--updates", type=int, default=1500, help="updates of 64 pictures (default: %(default)s)")
    parser.add_argument("--packages", type=Path, help="folder with the npm tarballs, to measure on an unseen style too")
    parser.add_argument("--output", type=Path, default=FEATURES, help="folder to write (default: the demo's own)")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda, mps (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train the network on every style of the pack, measure it and save it."""
    torch.manual_seed(0)
    pictures = [load_pictures(style) for style in (TEACHER_STYLE, "noto")]
    captions = pictures[0].captions
    network = FeatureNetwork([caption.name for caption in captions], [caption.general for caption in captions])
    train(network, pictures, args.updates, args.device)
    figures = report(network, pictures[0], args.packages)
    logger.info("accuracy on %d subjects: %s", len(captions), figures)
    network.save_pretrained(args.output, accuracy=figures)
    return 0
