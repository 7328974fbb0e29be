"""The shared code of diffusion transformers: blocks return image tokens, and sizes are whole patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ....flash_core.discriminator import feature_depths
from ...config import ModelSection
from ...errors import UserError
from ..base import Outline, Teacher
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

    @classmethod
    def load(cls, model: ModelSection, device: str, resolution: int | None) -> Teacher:
        """Load the weights; see :meth:`Teacher.load`.

        Raises:
            UserError: as in :meth:`Teacher.load`, or the resolution is no whole number of patches.
        """
        cls._check_resolution(model, resolution)
        return super().load(model, device, resolution)

    @classmethod
    def outline(cls, model: ModelSection, resolution: int | None) -> Outline:
        """Read the configuration files only; check the resolution as :meth:`load` does."""
        cls._check_resolution(model, resolution)
        return super().outline(model, resolution)

    @classmethod
    def _check_resolution(cls, model: ModelSection, resolution: int | None) -> None:
        source = cls.locate(model)
        levels = len(source.part_config("vae")["block_out_channels"])
        pixels = 2 ** (levels - 1) * source.part_config("transformer").get("patch_size", 2)  # 2 in every class
        if resolution is not None and resolution % pixels:
            nearest = max(round(resolution / pixels), 1) * pixels
            raise UserError(
                f"data.resolution: {resolution} is no whole number of this model's patches; expected a multiple of "
                f"{pixels} pixels, such as {nearest}"
            )
