"""The exception for errors that a user can correct. The command line prints its message without a traceback."""

from __future__ import annotations

from pathlib import Path

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


class UserError(Exception):
    """An error that the user can correct. Its message says what was given, what was expected and what to do."""


def refuse_pickle(path: Path, field: str) -> None:
    """Raise UserError for a file whose name ends like a pickle's; ``field`` is the recipe's field, for the message."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{field}: {path.name} is a pickle; loading a pickle can run code, so pickles are refused. Set {field} to "
            "a .safetensors file or a diffusers folder"
        )
