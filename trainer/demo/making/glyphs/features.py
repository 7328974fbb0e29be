"""Train the network that measures the glyph teacher's pictures: a classifier of the 62 glyphs.

Accuracies have a ceiling below 100 %: many typefaces draw I and l, O and 0 alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ....metrics.feature_network import FeatureNetwork
from ..features import accuracy, fit
from ..patch_pca import PatchPCA
from .fonts import GLYPHS, GlyphSet, name_of
from .training import rgb

WIDTHS = (24, 32, 48, 64)
LEARNING_RATE = 4e-3
CODED = 3  # one batch in so many is seen through the latents' code, with noise


def build_features() -> FeatureNetwork:
    """Return an untrained network, 0.13 M parameters. A glyph's general caption is its name: any typeface."""
    names = [name_of(glyph) for glyph in GLYPHS]
    return FeatureNetwork(names, names, WIDTHS)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move, turn, scale and soften pictures (B, 3, H, W) a little: the case of a glyph must stay as it is."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle, scale, shift = uniform(-0.08, 0.08), uniform(0.94, 1.06), uniform(-0.06, 0.06, 2)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = (torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = torch.lerp(images, soft, uniform(0, 1, 1, 1, 1))
    return (images + uniform(0, 0.08, 1, 1, 1) * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def train(network: FeatureNetwork, pictures: GlyphSet, code: PatchPCA, updates: int, seed: int = 0) -> None:
    """Train the network to classify augmented pictures, with a cosine learning rate."""
    labels = torch.tensor([GLYPHS.index(glyph.character) for glyph in pictures.glyphs])
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(pictures), (64,), generator=generator)
        batch = rgb(pictures.images[index])
        if step % CODED == 0:
            latents = code.encode(batch)
            amount = 0.3 * torch.rand(len(latents), 1, 1, 1, generator=generator)
            batch = code.decode(latents + amount * torch.randn(latents.shape, generator=generator)).clamp(0, 1)
        return augment(batch, generator), labels[index]

    fit(network, draw, updates, LEARNING_RATE)


def report(network: FeatureNetwork, held_out: GlyphSet, code: PatchPCA) -> dict[str, float]:
    """Return the accuracy on pictures of families that the network never saw, as they are and through the code."""
    images, names = rgb(held_out.images), [glyph.name for glyph in held_out.glyphs]
    coded = torch.cat([code.decode(code.encode(part)).clamp(0, 1) for part in images.split(100)])
    figures = {"unseen_families": accuracy(network, images, names), "patch_pca": accuracy(network, coded, names)}
    return {name: round(value, 4) for name, value in figures.items()}
