"""The models that a process of the trainer can distil: files and folders of ComfyUI's model folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ...flash_core.families import of_text_width, of_transformer_width

DEMO = "Flash demo"
AUTO = "auto"  # the configuration: the family's own, from the Hugging Face Hub
SUFFIX = ".safetensors"
FILE_FOLDERS = ("checkpoints", "diffusion_models")
FOLDERS = "diffusers"
INDEX = "model_index.json"

PREFIX = "model.diffusion_model."
TEXT_CHANNELS = 4  # a UNet's input of text to image; more for inpainting, upscaling and editing
# Class of a folder's pipeline -> what a recipe calls the family; UNets and SD3 are told apart by their configurations.
PIPELINES = {"PixArtAlphaPipeline": "pixart_alpha", "PixArtSigmaPipeline": "pixart_sigma"}
UNET_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

READABLE = "SD 1.5, SD 2, SDXL and SD3 as one file, and these and PixArt as a diffusers folder"
FLASH_DISTILL = "Load it in the graph and connect it to Flash Distill, which takes any MODEL"


@dataclass(frozen=True)
class Teacher:
    """A model as a recipe names it.

    Attributes:
        family: what a recipe calls the family.
        path: of the file or folder; None for the demo.
    """

    family: str
    path: Path | None = None


def model_names() -> list[str]:
    """Return the models to choose from: the demo, then ``FOLDER/NAME`` for each."""
    files = [
        f"{folder}/{name.replace(chr(92), '/')}"
        for folder in FILE_FOLDERS
        for name in folder_paths.get_filename_list(folder)
        if name.lower().endswith(SUFFIX)
    ]
    return [DEMO, *files, *(f"{FOLDERS}/{name}" for name in diffusers_folders())]


def diffusers_folders() -> dict[str, Path]:
    """Return {name: folder} of the models in diffusers' layout below ``models/diffusers``."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDERS)):
        for index in sorted(root.glob(f"*/{INDEX}")):
            found.setdefault(index.parent.name, index.parent)
    return found


def find_teacher(name: str) -> Teacher:
    """Return the model of a name from :func:`model_names`.

    Raises:
        ValueError: there is no such model, or the trainer has no teacher of its kind.
    """
    if name == DEMO:
        return Teacher("demo")
    if name not in model_names():
        raise ValueError(
            f"There is no model {name!r} in {', '.join((*FILE_FOLDERS, FOLDERS))}; expected one from the list. Press R "
            "to read the list again."
        )
    folder, _, inside = name.partition("/")
    if folder == FOLDERS:
        path = diffusers_folders()[inside]
        return Teacher(family_of_folder(path), path)
    path = Path(folder_paths.get_full_path_or_raise(folder, inside))
    return Teacher(family_of_file(path), path)


def find_config(name: str) -> Path | None:
    """Return the folder with a single file's configuration, None for the family's own on the Hub.

    Raises:
        ValueError: there is no such folder.
    """
    if name == AUTO:
        return None
    if name not in diffusers_folders():
        raise ValueError(f"There is no folder {name!r} in models/{FOLDERS}; expected one from the list, or {AUTO}.")
    return diffusers_folders()[name]


def family_of_file(path: Path) -> str:
    """Return what a recipe calls the family of a single file, from the names and shapes of its tensors.

    Raises:
        ValueError: the file is damaged, or the trainer cannot read such a model from one file.
    """
    shapes = _shapes(path)
    own = {key.removeprefix(PREFIX): shape for key, shape in shapes.items() if key.startswith(PREFIX)}
    inside = own or shapes
    text = next((shape for key, shape in inside.items() if key.endswith("attn2.to_k.weight")), None)
    first = inside.get("input_blocks.0.0.weight")
    if own and text and first:
        _check_channels(path.name, first[1])
        return _unet_family(path.name, text[1], text[0])
    width = inside.get("x_embedder.proj.weight", (0,))[0]
    if any(key.startswith("joint_blocks.") for key in inside) and of_transformer_width(width):
        return "sd35" if any(key.endswith(".x_block.attn.ln_q.weight") for key in inside) else "sd3"
    what = "a UNet without the rest of its checkpoint" if first else "a model that the trainer cannot read"
    raise ValueError(
        f"{path.name} is {what}; the trainer reads {READABLE}. {FLASH_DISTILL}, or choose such a file or folder."
    )


def family_of_folder(path: Path) -> str:
    """Return what a recipe calls the family of a diffusers folder, from its configurations.

    Raises:
        ValueError: a configuration is missing, or the trainer has no teacher of this family.
    """
    kind = str(_config(path / INDEX).get("_class_name"))
    if kind in PIPELINES:
        return PIPELINES[kind]
    if kind == "StableDiffusion3Pipeline":
        return "sd35" if _config(path / "transformer" / "config.json").get("qk_norm") else "sd3"
    if kind in UNET_PIPELINES:
        unet = _config(path / "unet" / "config.json")
        _check_channels(path.name, int(unet.get("in_channels", TEXT_CHANNELS)))
        return _unet_family(path.name, int(unet.get("cross_attention_dim", 0)))
    raise ValueError(
        f"{path.name} is a {kind}; the trainer reads {READABLE}. {FLASH_DISTILL}, or choose such a file or folder."
    )


def _unet_family(name: str, width: int, channels: int = 0) -> str:
    family = of_text_width(width, channels)
    if family is None or not family.recipe:
        raise ValueError(
            f"{name} reads text {width} wide, as no family of the trainer does; it reads {READABLE}. {FLASH_DISTILL}."
        )
    return family.recipe


def _check_channels(name: str, channels: int) -> None:
    if channels != TEXT_CHANNELS:
        raise ValueError(
            f"{name} reads {channels} channels, so it is no model of text to image ({TEXT_CHANNELS} channels), but "
            "one for inpainting, upscaling or editing. Distil it with the trainer on the command line and a recipe of "
            "its task; see docs/train_your_own.md."
        )


def _shapes(path: Path) -> Mapping[str, Sequence[int]]:
    """Return the shapes of a file's tensors by name, from its header alone.

    Raises:
        ValueError: the file is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is no readable safetensors file: {error}. Download it again.") from error


def _config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download the model again.") from error
    return content if isinstance(content, dict) else {}
