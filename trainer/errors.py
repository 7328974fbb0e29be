"""The exception for errors that a user can correct. The command line prints its message without a traceback."""

from __future__ import annotations

from pathlib import Path

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


class UserError(Exception):
    """An error that the user can correct. Its message says what was given, what was expected and what to do."""


def refuse_pickle(path: Path, field: str, reader: str) -> None:
    """Raise UserError for a file whose name ends like a pickle's.

    Args:
        field: the recipe's field, for the message.
        reader: the class of diffusers that converts the file.
    """
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{field}: {path.name} is a pickle; loading a pickle can run code, so pickles are refused. Set {field} to "
            "a .safetensors file or a diffusers folder. If there is none and you trust the file's maker, convert it "
            f'once: python -c "from diffusers import {reader} as R; '
            f"R.from_single_file({str(path)!r}).save_pretrained('converted')\", and set {field} to converted"
        )
