"""Weights of published networks that metrics and losses need: found, downloaded once, and read without unpickling."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def hub_file(url: str) -> Path:
    """A published file in PyTorch's hub folder (``$TORCH_HOME/hub/checkpoints``), downloaded where it is missing.

    Args:
        url: its name ends in the beginning of its SHA-256, ``-0123abcd.pth``, which is checked.

    Raises:
        UserError: it can't be had.
    """
    import torch

    name = url.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    named = re.search(r"-([0-9a-f]{8,})\.", name)
    assert named is not None, url
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=named[1], progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(f"{url} can't be downloaded ({error}); fetch it elsewhere and put it at {path}") from error
    return path


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors or a PyTorch file, on the CPU. The latter is read by PyTorch's restricted loader.

    Raises:
        UserError: there is no such file, or it holds anything but tensors by name.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"there is no file {path}; expected weights as .safetensors or .pth")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} can't be read as tensors by name: it is damaged, or holds something else, which is not loaded "
            f"({reason})"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds something else than tensors by name; expected a network's weights")
    return tensors
