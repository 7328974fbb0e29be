"""LPIPS as a differentiable distance, for distillation on decoded crops."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import UserError


def lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The perceptual distance of Zhang et al. (arXiv 1801.03924) with VGG features, images (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: torchvision, or its VGG weights (downloaded once), can't be had.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg").to(device).requires_grad_(False)
    except (ImportError, ModuleNotFoundError, OSError) as error:
        raise UserError(
            f"method.distillation: 'lpips' needs torchvision and its VGG weights ({error}); "
            "pip install torchvision, or choose mse, l1 or pseudo_huber"
        ) from error

    def distance(images: Tensor, reference: Tensor) -> Tensor:
        value = metric(images.clamp(-1, 1), reference.clamp(-1, 1))
        metric.reset()  # it also keeps a running mean, which nobody reads
        return value

    return distance
