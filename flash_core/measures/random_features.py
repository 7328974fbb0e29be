"""Features that nothing was trained on: a convolutional network with fixed random weights.

Naeem et al. (arXiv 2002.09797, section 4) measure generative models by embeddings of a randomly initialised network
where a trained network would be biased to its own data. Here four levels of random 3 x 3 convolutions see colours,
edges and textures at four scales; each channel is averaged over the picture. The weights come from a fixed seed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (16, 32, 64, 128)  # channels of the levels; each level sees half the resolution of the previous one
LARGEST = 256  # pixels, of the longer side; larger pictures are reduced
SEED = 0


class RandomFeatures:
    """The network; call it with pictures (B, 3, H, W) in [0, 1] to get features (B, 240)."""

    title = "random convolutional features"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.kernels = [
            torch.randn(width, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5  # He et al. 2015
            for channels, width in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)
        ]

    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, 240), float32, on the pictures' device."""
        x = 2 * images.float() - 1
        longer = max(x.shape[-2:])
        if longer > LARGEST:
            size = [max(1, round(side * LARGEST / longer)) for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        means = []
        for kernel in self.kernels:
            x = F.conv2d(x, kernel.to(x.device), padding=1).relu()
            means.append(x.mean((2, 3)))
            if min(x.shape[-2:]) > 1:
                x = F.avg_pool2d(x, 2)
        return torch.cat(means, 1)
