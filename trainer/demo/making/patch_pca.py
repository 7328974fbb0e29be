"""The demo's latents: scaled patch-PCA coefficients, a linear, exact map from 8x8 pixel blocks to 16 numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...files import write_whole
from ..assets import DATA

LATENT_CHANNELS = 16  # linear reconstruction of Fluent 3D: 22.0 / 25.7 / 27.8 / 29.5 dB with 4 / 8 / 12 / 16
PATCH = 8  # pixels; ComfyUI's empty latents assume a factor of 8 between pixels and latents
WHITENING = 0.5  # exponent: 0 keeps the coefficients' variances, 1 makes them all equal
PCA_FILE = "patch_pca.safetensors"


@dataclass(frozen=True)
class PatchPCA:
    """A linear code of PATCH x PATCH pixel blocks.

    `mean` (D,), `encoder` (C, D), `decoder` (D, C): D = 3 * PATCH**2 pixel values in [0, 1], C latent channels.
    """

    mean: Tensor
    encoder: Tensor
    decoder: Tensor

    @classmethod
    def fit(cls, images: Tensor, channels: int = LATENT_CHANNELS, whitening: float = WHITENING) -> PatchPCA:
        """Fit the leading components of all blocks of `images` (N, 3, H, W) in [0, 1] and of their mirror images.

        Each coefficient is divided by its standard deviation to the power `whitening`, and all by one number, so that
        the latents have unit variance on average. With full whitening (1), an invisible component would weigh as
        much in the diffusion loss as the one that carries the picture; without (0), the first would drown the others.

        A component's sign is arbitrary and may differ between machines: keep the code (`save`) that a model has learnt.
        """
        blocks = torch.cat([_blocks(images), _blocks(images.flip(-1))]).reshape(-1, 3 * PATCH**2).double()
        mean = blocks.mean(0)
        covariance = (blocks - mean).T @ (blocks - mean) / len(blocks)
        variance, vectors = torch.linalg.eigh(covariance)
        deviation, basis = variance.flip(0)[:channels].sqrt(), vectors.flip(1).T[:channels]
        scale = deviation**-whitening
        scale = scale / (deviation * scale).square().mean().sqrt()
        return cls(mean.float(), (basis * scale[:, None]).float(), (basis / scale[:, None]).T.contiguous().float())

    def encode(self, images: Tensor) -> Tensor:
        """Return latents (B, C, H/8, W/8) of images (B, 3, H, W) in [0, 1]."""
        height, width = images.shape[-2] // PATCH, images.shape[-1] // PATCH
        tokens = (_blocks(images) - self.mean) @ self.encoder.T
        latents: Tensor = tokens.transpose(1, 2).unflatten(2, (height, width))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [0, 1], of latents (B, C, H/8, W/8). A trained decoder should do better."""
        size = (latents.shape[-2] * PATCH, latents.shape[-1] * PATCH)
        blocks = latents.flatten(2).transpose(1, 2) @ self.decoder.T + self.mean
        return F.fold(blocks.transpose(1, 2), size, PATCH, stride=PATCH)

    def save(self, folder: Path = DATA) -> None:
        """Write the code into `folder`."""
        from safetensors.torch import save_file

        tensors = {"mean": self.mean, "encoder": self.encoder, "decoder": self.decoder}
        write_whole(folder / PCA_FILE, lambda partial: save_file(tensors, partial))

    @classmethod
    def load(cls, folder: Path = DATA) -> PatchPCA:
        """Read the code that `save` wrote."""
        from safetensors.torch import load_file

        return cls(**load_file(folder / PCA_FILE))


def _blocks(images: Tensor) -> Tensor:
    """Cut images (B, 3, H, W) into blocks, (B, H/8 * W/8, 3 * 64)."""
    return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of images (B, 3, H, W) in [0, 1] against references: (B,)."""
    return -10 * (images - reference).square().mean((1, 2, 3)).log10()
