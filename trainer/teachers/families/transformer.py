"""The shared code of diffusion transformers: blocks return image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ....flash_core.discriminator import feature_depths
from ..base import Teacher
from ..denoiser import DiffusersDenoiser


class TransformerDenoiser(DiffusersDenoiser):
    """A diffusers transformer over square patches of the latent."""

    def feature_blocks(self) -> Sequence[nn.Module]:
        """Return blocks of several depths; see :func:`~...flash_core.discriminator.feature_depths`."""
        blocks = list(self.network.transformer_blocks)
        return [blocks[index] for index in feature_depths(len(blocks))]

    def as_map(self, output: Any, z_t: Tensor) -> Tensor:
        """Return the image's tokens (B, h w, D) as a map (B, D, h, w); joint blocks return (text, image)."""
        tokens: Tensor = output[1] if isinstance(output, tuple) else output
        return rearrange(tokens, "b (h w) d -> b d h w", h=z_t.shape[-2] // self.network.config.patch_size)


class TransformerTeacher(Teacher):
    """A teacher whose network is a transformer."""

    network_part = "transformer"
    transformer = True
