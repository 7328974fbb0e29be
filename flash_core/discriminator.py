"""The discriminator: small conv heads on hidden states of the frozen teacher, one per depth, and one on the latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

FEATURE_DEPTHS = 4  # blocks of a transformer that the discriminator reads


def feature_depths(blocks: int) -> list[int]:
    """Return the indices of the transformer blocks that the discriminator reads: at 1/5, 2/5, 3/5 and 4/5 of the depth.

    The first blocks hold mostly the input's noise and the last blocks mostly the prediction; the blocks between hold
    what the picture shows.
    """
    parts = FEATURE_DEPTHS + 1
    return sorted({blocks * part // parts for part in range(1, parts)})


class Discriminator(nn.Module):
    """Score the teacher's feature maps of several depths; only these heads are trained.

    Args:
        channels: the channel count of each feature map, as ``Denoiser.features`` returns them.
        hidden: the width of each head.
        latents: the channel count of the latents, for one more head that reads them without noise; 0 for no such head.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 64, latents: int = 0) -> None:
        super().__init__()
        if not channels:
            raise ValueError("a discriminator needs the channel count of at least one feature map")
        self.channels = tuple(channels)
        self.reads_latents = latents > 0
        self.heads = nn.ModuleList(_head(width, hidden) for width in channels)
        if self.reads_latents:
            self.heads.append(_latent_head(latents, hidden))

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Map feature maps (B, C_i, H_i, W_i), and latents (B, C, H, W) after them, to logits (B, 1, H'_i, W'_i)."""
        if len(views) != len(self.heads):
            raise ValueError(f"expected {len(self.heads)} maps, one for each head; got {len(views)}")
        return [head(view.float()) for head, view in zip(self.heads, views, strict=True)]


def _head(channels: int, hidden: int) -> nn.Sequential:
    # The input is normalised first: hidden states of different depths differ by orders of magnitude.
    groups = math.gcd(8, hidden)
    return nn.Sequential(
        nn.GroupNorm(1, channels, affine=False),
        nn.Conv2d(channels, hidden, 1),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.GroupNorm(groups, hidden),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
        nn.GroupNorm(groups, hidden),
        nn.SiLU(),
        nn.Conv2d(hidden, 1, 1),
    )


def _latent_head(channels: int, hidden: int) -> nn.Sequential:
    # Without normalisation: what a blur lacks is contrast, which a norm would give back.
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(hidden, 1, 1),
    )
