"""The Inception network of the Fréchet Inception distance, in plain PyTorch.

FID is defined by one set of weights: the graph of December 2015 that TensorFlow shipped, in the PyTorch form that
pytorch-fid and torch-fidelity publish, whose layer names are used here. torchvision's Inception v3 is another network:
pooling, last block and weights differ, and so do the figures.

torch-fidelity is not used: it unpickles the weights, and its import needs a torchvision that fits the installed torch.
A test compares this network with torch-fidelity's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import file_hash
from .published_weights import hub_file, read_tensors

# 95 MB; pytorch-fid publishes the same file as pt_inception-2015-12-05-6726825d.pth.
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"  # how the SHA-256 of that file begins
INPUT_SIZE = 299  # px, width and height
FEATURES = 2048  # numbers that describe a picture
CLASSIFIER = (1008, 2048)  # shape of the last layer's weight, told from the 1000 classes of torchvision's network


@dataclass(frozen=True)
class Step:
    """A convolution of a branch: name in the weights, channels out, kernel, stride."""

    name: str
    channels: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1


class Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; keeps the size unless it strides or is not ``padded``."""

    def __init__(self, channels: int, step: Step, padded: bool = True) -> None:
        super().__init__()
        kernel = (step.kernel, step.kernel) if isinstance(step.kernel, int) else step.kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and step.stride == 1 else 0
        self.conv = nn.Conv2d(channels, step.channels, kernel, step.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(step.channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, channels, h', w')."""
        return torch.relu(self.bn(self.conv(x)))


AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAXIMUM = nn.MaxPool2d(3, stride=1, padding=1)
HALVE = nn.MaxPool2d(3, stride=2)

Pool = nn.AvgPool2d | nn.MaxPool2d
# The layers of a branch, in order; the steps of a tuple run side by side and their channels are stacked.
Branch = list[Step | tuple[Step, ...] | Pool]


class Mixed(nn.Module):
    """An Inception block: branches side by side, their channels stacked."""

    def __init__(self, channels: int, *branches: Branch) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            inner = channels
            for part in branch:
                for step in _steps(part):
                    self.add_module(step.name, Convolution(inner, step))
                inner = sum(step.channels for step in _steps(part)) or inner

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, sum of the branches' channels, h', w')."""
        results = []
        for branch in self.branches:
            y = x
            for part in branch:
                if isinstance(part, Pool):
                    y = part(y)
                else:
                    y = torch.cat([self.get_submodule(step.name)(y) for step in _steps(part)], 1)
            results.append(y)
        return torch.cat(results, 1)


def _steps(part: Step | tuple[Step, ...] | Pool) -> tuple[Step, ...]:
    """Return the convolutions in a part of a branch."""
    if isinstance(part, Pool):
        return ()
    return part if isinstance(part, tuple) else (part,)


def _mixed_5(channels: int, pooled: int) -> Mixed:
    return Mixed(
        channels,
        [Step("branch1x1", 64)],
        [Step("branch5x5_1", 48), Step("branch5x5_2", 64, 5)],
        [Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3)],
        [AVERAGE, Step("branch_pool", pooled)],
    )


def _mixed_6a() -> Mixed:
    return Mixed(
        288,
        [Step("branch3x3", 384, 3, stride=2)],
        [Step("branch3x3dbl_1", 64), Step("branch3x3dbl_2", 96, 3), Step("branch3x3dbl_3", 96, 3, stride=2)],
        [HALVE],
    )


def _mixed_6(inner: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(
        768,
        [Step("branch1x1", 192)],
        [Step("branch7x7_1", inner), Step("branch7x7_2", inner, row), Step("branch7x7_3", 192, column)],
        [
            Step("branch7x7dbl_1", inner),
            Step("branch7x7dbl_2", inner, column),
            Step("branch7x7dbl_3", inner, row),
            Step("branch7x7dbl_4", inner, column),
            Step("branch7x7dbl_5", 192, row),
        ],
        [AVERAGE, Step("branch_pool", 192)],
    )


def _mixed_7a() -> Mixed:
    return Mixed(
        768,
        [Step("branch3x3_1", 192), Step("branch3x3_2", 320, 3, stride=2)],
        [
            Step("branch7x7x3_1", 192),
            Step("branch7x7x3_2", 192, (1, 7)),
            Step("branch7x7x3_3", 192, (7, 1)),
            Step("branch7x7x3_4", 192, 3, stride=2),
        ],
        [HALVE],
    )


def _mixed_7(channels: int, pool: Pool) -> Mixed:
    def fork(name: str) -> tuple[Step, Step]:
        return Step(f"{name}a", 384, (1, 3)), Step(f"{name}b", 384, (3, 1))

    return Mixed(
        channels,
        [Step("branch1x1", 320)],
        [Step("branch3x3_1", 384), fork("branch3x3_2")],
        [Step("branch3x3dbl_1", 448), Step("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, Step("branch_pool", 192)],
    )


class Inception(nn.Sequential):
    """The network up to its pooled features, in evaluation mode, without gradients."""

    def __init__(self) -> None:
        layers: dict[str, nn.Module] = {
            "Conv2d_1a_3x3": Convolution(3, Step("1a", 32, 3, stride=2)),
            "Conv2d_2a_3x3": Convolution(32, Step("2a", 32, 3), padded=False),
            "Conv2d_2b_3x3": Convolution(32, Step("2b", 64, 3)),
            "MaxPool_1": HALVE,
            "Conv2d_3b_1x1": Convolution(64, Step("3b", 80)),
            "Conv2d_4a_3x3": Convolution(80, Step("4a", 192, 3), padded=False),
            "MaxPool_2": HALVE,
            "Mixed_5b": _mixed_5(192, 32),
            "Mixed_5c": _mixed_5(256, 64),
            "Mixed_5d": _mixed_5(288, 64),
            "Mixed_6a": _mixed_6a(),
            "Mixed_6b": _mixed_6(128),
            "Mixed_6c": _mixed_6(160),
            "Mixed_6d": _mixed_6(160),
            "Mixed_6e": _mixed_6(192),
            "Mixed_7a": _mixed_7a(),
            "Mixed_7b": _mixed_7(1280, AVERAGE),
            "Mixed_7c": _mixed_7(2048, MAXIMUM),  # maximum, unlike the blocks before, as in the graph of 2015
        }
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, 299, 299), values 0..255, to features (B, 2048)."""
        # torch has no types for Sequential.forward.
        features: Tensor = super().forward((images - 128) / 128)  # type: ignore[no-untyped-call]
        return features.mean((2, 3))


def load_inception(path: Path | None, device: torch.device | str) -> tuple[Inception, str]:
    """Load the network; return it with a hash of the weights file.

    Args:
        path: .pth or .safetensors; None = the published file, downloaded once.

    Raises:
        UserError: the file is missing, can't be downloaded, or holds another network.
    """
    path = path or hub_file(URL)
    tensors = read_tensors(path)
    network = Inception()
    counters = "num_batches_tracked"  # of training; some copies of the file lack them, and nothing here reads them
    expected = {name: value.shape for name, value in network.state_dict().items() if not name.endswith(counters)}
    present = {name: value.shape for name, value in tensors.items() if not name.endswith(counters)}
    if present.get("fc.weight") == CLASSIFIER:  # the classifier after the features is left out
        present = {name: shape for name, shape in present.items() if not name.startswith("fc.")}
    if wrong := sorted({name for name, _ in expected.items() ^ present.items()}):
        raise UserError(
            f"{path} is not the Inception of FID: {len(wrong)} tensors differ, such as {wrong[0]}; expected the file "
            f"of {URL} (torchvision's Inception v3 is another network)"
        )
    network.load_state_dict({name: tensors[name] for name in expected}, strict=False)
    return network.to(device), file_hash(path)
