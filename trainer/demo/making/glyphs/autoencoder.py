"""Train the glyph teacher's autoencoder, as the first teacher's: decoder and encoder apart, on the exact latents."""

from __future__ import annotations

from ..autoencoder import AutoencoderTraining
from ..patch_pca import PatchPCA
from .architecture import build_autoencoder
from .fonts import GlyphSet

MEASURED = 400  # held-out pictures


class GlyphAutoencoderTraining(AutoencoderTraining):
    """The two stages on pictures of 64 px."""

    CROPS = ((0.4, 32, 16), (1.0, 64, 6))

    @classmethod
    def of_glyphs(cls, train: GlyphSet, held_out: GlyphSet, code: PatchPCA) -> GlyphAutoencoderTraining:
        """Prepare a fresh autoencoder."""
        images, unseen = (pictures.images[:, None].expand(-1, 3, -1, -1) for pictures in (train, held_out))
        return cls(build_autoencoder(), code, images, {"held_out": unseen[:: max(len(unseen) // MEASURED, 1)]})
