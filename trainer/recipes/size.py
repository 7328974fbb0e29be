"""How large a recipe's model and data are, read from file headers and names alone: presets follow from it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...flash_core.families import FAMILIES

NETWORKS = ("unet", "transformer")  # folders of the denoising network in a diffusers folder
DENOISER = "model.diffusion_model."  # its keys in a single-file checkpoint
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".heic", ".gif", ".tif", ".tiff"}
MOST_FILES = 100_000  # that are counted; more say no more about the budget
DEMO_PARAMETERS = {"glyphs": 1_446_224.0}  # of embedded teachers by their names; the demo's are its family's
DEMO_SAMPLES = {"demo": 300, "demo-swaps": 3000, "demo-glyphs": 578}


def model_size(model: Mapping[str, Any]) -> tuple[float, str]:
    """Return the parameters of a recipe's denoising network, and where the number is from.

    Args:
        model: the recipe's section, unchecked.
    """
    path = Path(str(model.get("path") or "")).expanduser()
    files = []
    if path.is_dir():
        files = [file for name in NETWORKS for file in sorted((path / name).glob("*.safetensors"))]
    elif path.is_file() and path.suffix == ".safetensors":
        files = [path]
    counted = sum(map(_parameters, _one_variant(files)))
    if counted:
        return float(counted), f"counted in {path}"
    if model.get("family") == "demo" and str(path) in DEMO_PARAMETERS:
        return DEMO_PARAMETERS[str(path)], f"counted in {path}"
    family = next((family for family in FAMILIES if family.recipe == model.get("family")), None)
    if family is None or not family.parameters:
        return FAMILIES[0].parameters, "of SD 1.5, since the family is not known"
    return family.parameters, f"usual for {family.name}"


def data_size(data: Mapping[str, Any]) -> tuple[int | None, str]:
    """Return how many samples a recipe's data have, and where the number is from; None where only reading would tell.

    Args:
        data: the recipe's section, unchecked.
    """
    source, limit = data.get("source"), data.get("limit")
    count = DEMO_SAMPLES.get(str(source))
    path = Path(str(data.get("path") or "")).expanduser()
    if source == "folder" and path.is_dir():
        count = 0
        for file in path.rglob("*"):
            count += file.suffix.lower() in PICTURES
            if count == MOST_FILES:
                break
    if source == "prompts" and path.is_file() and path.suffix == ".txt":
        with path.open(encoding="utf-8", errors="replace") as lines:
            count = sum(1 for line in lines if line.strip())
    if isinstance(limit, int) and (count is None or limit < count):
        return limit, "data.limit"
    return count, "counted" if count is not None else "not counted"


def _one_variant(files: list[Path]) -> list[Path]:
    """Return the files of one variant, such as fp16: those without a variant, if there are any."""
    plain = [file for file in files if "fp16" not in file.name and "non_ema" not in file.name]
    return plain or files


def _parameters(file: Path) -> int:
    """Return the numbers in a .safetensors file's denoising network, from its header; 0 where it is unreadable."""
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            header = json.loads(content.read(min(length, 100_000_000)))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return 0  # loading the model says what is wrong with the file
    own = {name: shape for name, shape in shapes.items() if name.startswith(DENOISER)}
    return sum(math.prod(shape) for shape in (own or shapes).values())
