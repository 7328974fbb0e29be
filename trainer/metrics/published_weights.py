"""Find published weights of metrics and losses, download them once, and read them without unpickling."""

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
    """Return a published file in PyTorch's hub folder (``$TORCH_HOME/hub/checkpoints``); download it if missing.

    Args:
        url: the file name ends with the beginning of its SHA-256, ``-0123abcd.pth``, which is checked.

    Raises:
        UserError: the file can't be downloaded.
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
        raise UserError(
            f"{url} can't be downloaded ({error}); download it on another machine and put it at {path}"
        ) from error
    return path


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Read the tensors of a .safetensors or PyTorch file on the CPU; PyTorch files by the restricted loader.

    Raises:
        UserError: the file is missing, or holds anything but tensors by name.
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
            f"{path} can't be read as tensors by name: the file is damaged, or holds other objects, which are "
            f"never loaded ({reason}); download the weights again"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} does not hold tensors by name; expected a network's weights")
    return tensors
