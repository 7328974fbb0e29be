"""The feature network: a small classifier of the demo's pictures; distances are measured between its embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..demo.assets import FEATURES
from ..demo.shards import SIZE
from ..files import write_text_whole, write_whole

WIDTHS = (32, 64, 96, 128)
EMBEDDING = 64  # well below the usual numbers of samples, or a covariance would be singular


class FeatureNetwork(nn.Module):
    """A convolutional network: (B, 3, H, W) in [0, 1] to embedding (B, 64) and logits (B, classes)."""

    def __init__(self, classes: list[str], general: list[str], widths: Sequence[int] = WIDTHS) -> None:
        """`classes` are the subjects' names, in the order of the logits, `general` each one's general caption.

        `widths` are the channels of the levels, at 1/4, 1/8, 1/16 and 1/32 of the size.
        """
        super().__init__()
        self.classes, self.general, self.widths = list(classes), list(general), list(widths)
        self.title = "a feature network"
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 6, stride=4, padding=1, bias=False)]
        for previous, width in zip((widths[0], *widths[:-1]), widths, strict=True):
            stride = 1 if previous == width else 2
            layers += [
                nn.BatchNorm2d(previous),
                nn.ReLU(),
                nn.Conv2d(previous, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
            ]
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.embed = nn.Linear(widths[-1], EMBEDDING)
        self.classify = nn.Linear(EMBEDDING, len(classes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return embedding (B, 64) and logits (B, classes) of images (B, 3, H, W) in [0, 1]; any size is resized."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        # On a white ground the mean is near 1: centred there, the empty border is zero, like the padding.
        embedding = self.embed(self.body(2 * (images - 1)).mean((2, 3)))
        return embedding, self.classify(embedding)

    def save_pretrained(self, folder: Path, **facts: object) -> None:
        """Write `config.json` (with any `facts`) and `model.safetensors`, in half precision."""
        from safetensors.torch import save_file

        tensors = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in self.state_dict().items()
        }
        write_whole(folder / "model.safetensors", lambda partial: save_file(tensors, partial))
        config = {"classes": self.classes, "general": self.general, "widths": self.widths, **facts}
        write_text_whole(folder / "config.json", json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path = FEATURES) -> FeatureNetwork:
        """Load a folder of `save_pretrained` in float32, in evaluation mode, without gradients."""
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text())
        network = cls(config["classes"], config["general"], config.get("widths", WIDTHS))
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network.eval().requires_grad_(False)
