"""Make the low-resolution pictures of super-resolution: blur, down-scaling, noise, JPEG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RESAMPLING = ("area", "bilinear", "bicubic")


def degrade(
    images: Tensor,
    scale: int,
    generator: torch.Generator,
    *,
    blur: tuple[float, float],
    noise: tuple[float, float],
    jpeg: tuple[int, int] | None,
) -> Tensor:
    """Return low-resolution versions (B, 3, H / scale, W / scale) in [-1, 1], each with random strengths.

    Args:
        images: (B, 3, H, W) in [-1, 1]; H and W are multiples of ``scale``.
        blur: low and high of the Gaussian's standard deviation, in pixels of the low-resolution picture; 0 is none.
        noise: low and high of the Gaussian noise's standard deviation, in units of the range [0, 1].
        jpeg: low and high of JPEG's quality, 1..95; None leaves it out.

    Raises:
        ValueError: the size is no multiple of ``scale``.
    """
    height, width = images.shape[-2:]
    if height % scale or width % scale:
        raise ValueError(f"pictures of {width} x {height} pixels can't be reduced {scale} times to whole pixels")
    small = (height // scale, width // scale)
    reduced = []
    for image in images.split(1):
        sigma = _between(blur, generator) * scale
        blurred = gaussian_blur(image, sigma) if sigma > 0 else image
        mode = RESAMPLING[int(torch.randint(len(RESAMPLING), (), generator=generator))]
        smoothed = {} if mode == "area" else {"antialias": True}
        low = F.interpolate(blurred, small, mode=mode, **smoothed)
        # Standard deviations count the range [0, 1], pictures here span 2.
        grain = torch.randn(low.shape, generator=generator).to(low) * _between(noise, generator) * 2
        low = (low + grain).clamp(-1, 1)
        if jpeg is not None:
            low = through_jpeg(low, int(torch.randint(jpeg[0], jpeg[1] + 1, (), generator=generator)))
        reduced.append(low)
    return torch.cat(reduced)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Return a Gaussian blur of standard deviation ``sigma`` pixels over (B, C, H, W); borders repeat."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    channels = image.shape[1]
    rows = kernel.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1)
    columns = kernel.reshape(1, 1, 1, -1).repeat(channels, 1, 1, 1)
    padded = F.pad(image, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, rows, groups=channels), columns, groups=channels)


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """Return pictures (B, 3, H, W) in [-1, 1] after JPEG compression."""
    decoded = []
    for image in images:
        pixels = ((image.cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1))
    return torch.stack(decoded).to(images) / 127.5 - 1


def _between(limits: Sequence[float], generator: torch.Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(torch.rand((), generator=generator, dtype=torch.float64))
