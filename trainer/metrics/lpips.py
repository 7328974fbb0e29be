"""LPIPS as a differentiable distance, for distillation on decoded crops (Zhang et al., arXiv 1801.03924).

``sum over layers of mean over places of w . (u - v)^2``: u and v are the VGG-16 activations of two pictures, scaled to
length 1 at every place; w >= 0 are weights fitted to people's judgements. The weights w come with torchmetrics, VGG's
weights from PyTorch. torchmetrics' own module is not used: it needs torchvision, unpickles VGG's weights, and keeps
every value that it has returned. A test compares this module with torchmetrics'.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from .published_weights import hub_file, read_tensors

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
# Channels out of the 3 x 3 convolutions; activations are compared at the end of each group, then pooled.
GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# From [-1, 1] to the statistics of VGG's training pictures.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-8  # under the root, so that a place without activation has a gradient


class Lpips(nn.Module):
    """The distance without its weights, in evaluation mode, without gradients."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.ends = []  # of the groups, as positions in features
        channels = 3
        for group in GROUPS:
            for out in group:
                self.features.append(nn.Conv2d(channels, out, 3, padding=1)).append(nn.ReLU())
                channels = out
            self.ends.append(len(self.features) - 1)
            self.features.append(nn.MaxPool2d(2))
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(group[-1])) for group in GROUPS)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the distances (B,) of images (B, 3, H, W), clamped to [-1, 1]; H and W at least 16."""
        x = (torch.cat([images, reference]).clamp(-1, 1) - self.shift) / self.scale
        distance = x.new_zeros(len(images))
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                units = x / (x.square().sum(1, keepdim=True) + EPSILON).sqrt()
                first, second = units.chunk(2)
                weight = self.weights[self.ends.index(index)][:, None, None]
                distance = distance + (weight * (first - second).square()).sum(1).mean((1, 2))
                if index == self.ends[-1]:
                    break
        return distance


def lpips(device: torch.device, vgg: Path | None = None) -> Lpips:
    """Load the distance with its published weights.

    Args:
        vgg: VGG-16's weights, .pth or .safetensors; None = PyTorch's file, downloaded once.

    Raises:
        UserError: the weights can't be loaded, or belong to another network.
    """
    distance = Lpips()
    path = vgg or hub_file(URL)
    convolutions = {name: value for name, value in read_tensors(path).items() if name.startswith("features.")}
    fitted = read_tensors(_fitted_weights())
    weights = {f"weights.{index}": fitted[f"lin{index}.model.1.weight"].flatten() for index in range(len(GROUPS))}
    try:
        distance.load_state_dict({**convolutions, **weights})
    except RuntimeError as error:
        raise UserError(f"{path} does not hold VGG-16's weights; expected the file of {URL} ({error})") from error
    return distance.to(device)


def lpips_of_unit_pictures(device: torch.device, vgg: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS as a function of two sets of pictures (B, 3, H, W) in [0, 1]; it gives (B,) float64 on the CPU."""
    network = lpips(device, vgg)
    return lambda made, wanted: network((made * 2 - 1).to(device), (wanted * 2 - 1).to(device)).double().cpu()


def _fitted_weights() -> Path:
    """Return the file of LPIPS' own weights inside torchmetrics, 7 kB."""
    torchmetrics = importlib.util.find_spec("torchmetrics")
    if torchmetrics is None or torchmetrics.origin is None:
        raise UserError("method.distillation: 'lpips' takes its weights from torchmetrics; pip install torchmetrics")
    return Path(torchmetrics.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
