"""Check a diffusers folder before its weights are read, and read tokenizers that one library version writes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from ...errors import PICKLES, UserError
from .scaled import is_scaled

HEAVY = ("unet", "transformer", "vae", "text_encoder")  # starts of the names of parts with weights
TOKENIZER_CONFIG, FAST = "tokenizer_config.json", "tokenizer.json"


def check_folder(folder: Path, parts: Sequence[str]) -> None:
    """Check that every part is there with float weights in safetensors.

    Raises:
        UserError: a part is missing, has pickles in place of safetensors, or is quantised.
    """
    for part in parts:
        place = folder / part
        if not place.is_dir():
            raise _incomplete(folder, f"it lacks {part}/")
        if part.startswith("tokenizer") and not (place / TOKENIZER_CONFIG).is_file():
            raise _incomplete(folder, f"{part}/ lacks {TOKENIZER_CONFIG}, which says how prompts are padded and cut")
        if not part.startswith(HEAVY):
            continue
        weights = sorted(place.glob("*.safetensors"))
        if not weights:
            pickles = sorted(path.name for path in place.iterdir() if path.suffix in PICKLES)
            if pickles:
                raise _incomplete(folder, _only_pickles(folder, part, pickles[0]))
            raise _incomplete(folder, f"{part}/ has no .safetensors weights")
        for file in weights:
            if _scaled(file):
                raise UserError(
                    f"model.path: {file} holds scaled float8 weights, which can be read from single files only; put "
                    "the part's bfloat16 or float16 weights into the folder"
                )


def fast_tokenizers(folder: Path, parts: Sequence[str], index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizers that a folder holds as tokenizer.json only, which transformers 5 writes.

    The classes of transformers 4 that a pipeline's index names need the older files, and fail without naming them.

    Args:
        index: the pipeline's index: part -> [library, class].

    Raises:
        UserError: a tokenizer can't be read.
    """
    found = {}
    for part in parts:
        place = folder / part
        if not part.startswith("tokenizer") or not (place / FAST).is_file():
            continue
        if any((place / name).is_file() for name in ("vocab.json", "spiece.model")):
            continue
        name = str(index[part][1]).removesuffix("Fast")
        reader = getattr(transformers, f"{name}Fast", None)
        if reader is None:
            raise UserError(f"model.path: {place} is a tokenizer of the unknown class {name}; expected CLIP's or T5's")
        try:
            found[part] = reader.from_pretrained(place, local_files_only=True)
        except Exception as error:  # the library that reads tokenizer.json raises plain Exceptions
            raise UserError(f"model.path: the tokenizer {place / FAST} can't be read: {error}") from error
    return found


def _scaled(file: Path) -> bool:
    try:
        return is_scaled(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.path: {file} is not a readable safetensors file: {error}") from error


def _only_pickles(folder: Path, part: str, name: str) -> str:
    return (
        f"the weights in {part}/ are pickles only ({name}); loading a pickle can run code, so pickles are refused. "
        "Choose the model's safetensors weights. If there are none and you trust the model's maker, convert the folder "
        f'once: python -c "from diffusers import DiffusionPipeline as P; '
        f"P.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained('converted')\", and set model.path "
        "to converted"
    )


def _incomplete(folder: Path, reason: str) -> UserError:
    return UserError(f"model.path: {folder} is not a complete diffusers folder: {reason}")
