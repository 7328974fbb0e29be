"""Score pictures as people would: HPSv2, ImageReward, PickScore, or a CLIP's cosine, from local weights.

The libraries ``hpsv2`` and ``image-reward`` are no dependencies: they are used where they are installed.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...files import file_hash, fingerprint
from ...pictures import picture_from_unit
from ..clip_score import ClipScorer

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

EXPECTED = (
    "expected the weights of HPSv2 (HPS_v2.1_compressed.pt) or of ImageReward (ImageReward.pt, with med_config.json "
    "beside it), or the folder of a CLIP for transformers, such as PickScore_v1"
)
Score = Callable[[Sequence["Image.Image"], Sequence[str]], "Tensor"]


@dataclass(frozen=True)
class Preference:
    """A model of human preference.

    Attributes:
        title: the model in a few words.
        fingerprint: hash of the weights.
        score: B pictures and B prompts to scores (B,); higher = preferred.
    """

    title: str
    fingerprint: str
    score: Score

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores (B,), float32 on the CPU, of pictures (B, 3, H, W) in [0, 1]."""
        return self.score([picture_from_unit(image) for image in images.cpu()], prompts).float().cpu()


def load_preference(path: Path, device: torch.device | str) -> Preference:
    """Load a model of human preference; its kind is recognised from the path.

    Args:
        path: a folder is a CLIP: PickScore where its name says so, else CLIP's own cosine. A file is HPSv2 or
            ImageReward by its name.

    Raises:
        UserError: there is no such model, or its library is not installed.
    """
    name = path.name.lower().replace("_", "").replace("-", "")
    if path.is_dir():
        return _clip(path, device, is_pickscore="pickscore" in name)
    if not path.is_file():
        raise UserError(f"--preference: there is nothing at {path}; {EXPECTED}")
    if name.startswith("hps"):
        return Preference(f"HPSv2 ({path.name})", file_hash(path), _hpsv2(path, device))
    if name.startswith("imagereward"):
        return Preference(f"ImageReward ({path.name})", file_hash(path), _image_reward(path, device))
    raise UserError(f"--preference: {path.name} names no model that is known here; {EXPECTED}")


def _clip(folder: Path, device: torch.device | str, *, is_pickscore: bool) -> Preference:
    """Return PickScore, ``exp(logit scale) x cosine`` (Kirstain et al., arXiv 2305.01569), or a CLIP's cosine."""
    clip = ClipScorer.load(str(folder), device, option="--preference")
    scale = clip.model.logit_scale.exp().cpu() if is_pickscore else 1.0
    title = f"PickScore ({folder.name})" if is_pickscore else f"CLIP score ({folder.name})"
    return Preference(title, fingerprint(folder), lambda pictures, prompts: scale * clip(pictures, prompts))


def _hpsv2(path: Path, device: torch.device | str) -> Score:
    """Return HPSv2 (Wu et al., arXiv 2306.09341): the cosine of a CLIP ViT-H/14 that was fitted to people's choices.

    The library's own ``score`` reads its weights again for every prompt, so its network is used directly.
    """
    import torch

    scoring = _library("hpsv2.img_score", "hpsv2")
    scoring.device = str(device)
    scoring.initialize_model()
    network, preprocess = scoring.model_dict["model"], scoring.model_dict["preprocess_val"]
    tokenizer = scoring.get_tokenizer("ViT-H-14")
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--preference: {path} does not hold HPSv2's weights ({reason}); {EXPECTED}") from error
    network = network.to(device).eval()

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            pixels = torch.stack([preprocess(picture) for picture in pictures]).to(device)
            found = network(pixels, tokenizer(list(prompts)).to(device))
            cosines: Tensor = (found["image_features"] * found["text_features"]).sum(1)
            return cosines

    return score


def _image_reward(path: Path, device: torch.device | str) -> Score:
    """Return ImageReward (Xu et al., arXiv 2304.05977), standardised to mean 0 and deviation 1 on people's pictures."""
    import torch

    library = _library("ImageReward", "image-reward")
    settings = path.with_name("med_config.json")
    if not settings.is_file():
        raise UserError(f"--preference: {settings} is missing; put ImageReward's med_config.json beside its weights")
    try:
        network = library.load(str(path), device=str(device), med_config=str(settings))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--preference: {path} can't be loaded as ImageReward ({reason}); {EXPECTED}") from error

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            pairs = zip(pictures, prompts, strict=True)
            return torch.tensor([float(network.score(prompt, picture)) for picture, prompt in pairs])

    return score


def _library(module: str, package: str) -> Any:
    """Import a library.

    Raises:
        UserError: the library is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--preference: this model needs the library {package} ({error}); `pip install {package}`, or give the "
            "folder of a PickScore or CLIP"
        ) from error
