"""Train the glyph teacher's UNet and text encoder: noise prediction on the exact patch-PCA latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..patch_pca import PatchPCA
from ..teacher.architecture import tokenize
from ..teacher.training import Trainer, TrainingSet
from .architecture import build_scheduler
from .fonts import CATEGORIES, GLYPHS, WEIGHTS, GlyphSet, name_of

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# Shares of the captions, in the order of `caption_kinds`: empty (for guidance), style, glyph; the others are whole.
NULL, STYLE, NAME = 0.1, 0.1, 0.25
FIT_PICTURES = 2000  # to fit the patch-PCA; it has 16 components


@dataclass(frozen=True)
class GlyphLatents(TrainingSet):
    """Latents, and token ids of whole captions (`names`), of the glyphs' names (`general`), of styles, of the empty."""

    styles: Tensor

    @classmethod
    def encoded(cls, pictures: GlyphSet, code: PatchPCA, tokenizer: CLIPTokenizer) -> GlyphLatents:
        """Encode pictures by the exact patch-PCA, and captions as token ids."""
        whole, names = ([getattr(glyph, kind) for glyph in pictures.glyphs] for kind in ("caption", "name"))
        return cls(
            encode(pictures.images, code),
            tokenize(tokenizer, whole),
            tokenize(tokenizer, names),
            tokenize(tokenizer, [""]),
            tokenize(tokenizer, [f"{glyph.category}, {glyph.weight}" for glyph in pictures.glyphs]),
        )


class GlyphTrainer(Trainer):
    """The first teacher's training with noise prediction and captions of four kinds."""

    data: GlyphLatents

    def __init__(self, *args: object, **settings: object) -> None:
        """Prepare as the first teacher's training does."""
        super().__init__(*args, **settings)  # type: ignore[arg-type]  # handed on as they are
        self.alphas_cumprod = build_scheduler().alphas_cumprod.to(self.device)

    def target(self, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return what the UNet learns to predict: the noise."""
        return noise

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return latents, noise, timesteps (one in each of B equal parts of 0..999) and token ids."""
        size, generator, data = self.batch_size, self.generator, self.data
        index = torch.randint(len(data.latents), (size,), generator=generator)
        kind = torch.rand(size, 1, generator=generator)
        noise = torch.randn(size, *data.latents.shape[1:], generator=generator)
        timesteps = ((torch.rand(1, generator=generator) + torch.arange(size) / size) % 1 * 1000).long()
        tokens = torch.where(kind < NULL + STYLE + NAME, data.general[index], data.names[index])
        tokens = torch.where(kind < NULL + STYLE, data.styles[index], tokens)
        tokens = torch.where(kind < NULL, data.null, tokens)
        return data.latents[index], noise, timesteps, tokens


def rgb(images: Tensor) -> Tensor:
    """Return (N, 3, H, W) in [0, 1] of grey pictures (N, H, W) uint8."""
    return (images / 255)[:, None].expand(-1, 3, -1, -1)


def encode(images: Tensor, code: PatchPCA) -> Tensor:
    """Return the exact latents (N, 16, 8, 8) of grey pictures (N, 64, 64) uint8."""
    return torch.cat([code.encode(rgb(part)) for part in images.split(500)])


def fit_code(pictures: GlyphSet) -> PatchPCA:
    """Fit the latents' code to some of the pictures."""
    index = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:FIT_PICTURES]
    return PatchPCA.fit(rgb(pictures.images[index]))


def all_captions() -> list[str]:
    """Return every caption: the tokenizer learns its words from them."""
    styles = [f"{category}, {weight}" for category in CATEGORIES for weight in WEIGHTS.values()]
    return [*(f"{name_of(glyph)}, {style}" for glyph in GLYPHS for style in styles), *styles]
