"""Networks that describe pictures by features: the demo's network, the Inception of FID, or a CLIP, given by path.

Each maps pictures (B, 3, H, W) in [0, 1] to embeddings (B, D) and class scores (B, C). Inception and CLIP know no
names, so C is 0 there and no prompt accuracy is measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..demo.assets import FEATURES
from ..errors import UserError
from ..files import fingerprint
from .feature_network import FeatureNetwork
from .inception import INPUT_SIZE, Inception, load_inception

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPModel

EXPECTED = (
    "expected the folder of a feature network (config.json with classes, model.safetensors), the folder of a CLIP for "
    "transformers, or the weights file of FID's Inception (.pth or .safetensors)"
)


@dataclass(frozen=True)
class Features:
    """A network that describes pictures.

    Attributes:
        network: the network; a module, on the CPU when it is loaded.
        title: the network in a few words.
        fingerprint: hash of the weights.
        of_demo: whether this is the demo's network, which has seen only the demo's pictures.
    """

    network: Any
    title: str
    fingerprint: str
    of_demo: bool = False


class InceptionFeatures(nn.Module):
    """FID's Inception: 2,048 features of a picture."""

    classes: tuple[str, ...] = ()
    general: tuple[str, ...] = ()

    def __init__(self, inception: Inception, title: str) -> None:
        super().__init__()
        self.inception = inception
        self.title = title

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, 2048), and no scores, of images (B, 3, H, W) in [0, 1], resized to 299 x 299 pixels."""
        size = (INPUT_SIZE, INPUT_SIZE)
        resized = F.interpolate(images * 255, size, mode="bicubic", antialias=True, align_corners=False)
        features: Tensor = self.inception(resized)
        return features, features.new_zeros(len(features), 0)


class ClipFeatures(nn.Module):
    """The picture half of a CLIP: its embeddings of a picture, of length 1."""

    classes: tuple[str, ...] = ()
    general: tuple[str, ...] = ()

    def __init__(self, model: CLIPModel, processor: CLIPImageProcessor, title: str) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.processor = processor
        self.title = title

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, D) of length 1, and no scores, of images (B, 3, H, W) in [0, 1]."""
        from ..pictures import picture_from_unit

        pictures = [picture_from_unit(image) for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(images.device)
        embeddings: Tensor = F.normalize(self.projection(self.vision(pixels).pooler_output).float(), dim=1)
        return embeddings, embeddings.new_zeros(len(embeddings), 0)


def load_features(path: Path) -> Features:
    """Load a network that describes pictures, on the CPU.

    Args:
        path: the folder of a feature network or of a CLIP, or the weights file of FID's Inception.

    Raises:
        UserError: there is no such network.
    """
    if path.is_file():
        network, digest = load_inception(path, "cpu")
        title = f"Inception ({path.name})"
        return Features(InceptionFeatures(network, title), title, digest)
    config = _config(path)
    if "classes" in config:
        return _feature_network(path)
    if config.get("model_type") == "clip":
        return _clip(path)
    raise UserError(f"--features: {path} holds no network that is known here; {EXPECTED}")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"--features: there is no network at {folder}; {EXPECTED}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--features: {path} is not JSON ({error}); {EXPECTED}") from error
    if not isinstance(content, dict):
        raise UserError(f"--features: {path} holds no settings; {EXPECTED}")
    return content


def _feature_network(folder: Path) -> Features:
    from safetensors import SafetensorError

    try:
        network, digest = FeatureNetwork.from_pretrained(folder), fingerprint(folder)
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--features: {folder} can't be loaded ({reason}); {EXPECTED}") from error
    of_demo = digest == fingerprint(FEATURES)
    title = str(_config(folder).get("title", f"the feature network {folder.name}"))
    network.title = "the demo’s feature network" if of_demo else title
    return Features(network, network.title, digest, of_demo)


def _clip(folder: Path) -> Features:
    from transformers import CLIPImageProcessor, CLIPModel

    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True)
        processor = CLIPImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--features: the CLIP {folder} can't be loaded ({reason}); expected model.safetensors, config.json and "
            "preprocessor_config.json"
        ) from error
    title = f"the CLIP {folder.name}"
    network = ClipFeatures(model.eval().requires_grad_(False), processor, title)
    return Features(network, title, fingerprint(folder))


def samples_needed(features: int, times: float = 1) -> int:
    """Return the number of samples from which a Fréchet distance says more than its own bias.

    The bias grows with the features and falls with both sets, as D (1 / N + 1 / M); it is 0.5 here. With the demo's 64
    features: 256 samples against 256, or 192 against 384. Below, the undistilled teacher looks as good as the floor: of
    32 pictures of the demo it scores 0.92 x the floor in 4 steps, of 192 pictures 1.76 x, of 256 pictures 1.92 x.

    Args:
        features: D.
        times: samples of the set that runs are measured against, per sample of a run.
    """
    return round(2 * features * (1 + 1 / times))
