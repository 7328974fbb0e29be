"""A run's state on disk: safetensors files that are written whole or not at all. Nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ....flash_core.lora.writing import save_whole

STATE = "state.safetensors"
LORA = "lora.safetensors"
FACTS = "flash.distil"  # the header's field with what is no tensor
SAFE_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def safe_name(name: str) -> str:
    """Return a name with only letters, digits, dots, ``_`` and ``-``, for a folder: "my style!" becomes "my-style"."""
    return SAFE_NAME.sub("-", name).strip("-.") or "flash"


def unfinished(output: Path, name: str, current: Path) -> list[Path]:
    """Return the folders of other runs of this name that have a state but no LoRA: they had other inputs."""
    folders = sorted(output.glob(f"{safe_name(name)}-*"))
    return [path for path in folders if path != current and (path / STATE).is_file() and not (path / LORA).is_file()]


def runs_in(output: Path) -> dict[Path, str]:
    """Return the state of each run in the folder of all runs, in words, by its folder: the newest last."""
    states = sorted(output.glob(f"*/{STATE}"), key=lambda path: path.stat().st_mtime)
    return {path.parent: _in_words(path) for path in states}


def _in_words(state: Path) -> str:
    """Return how far a run is; only the header of its state is read."""
    try:
        with safe_open(state, framework="pt") as opened:
            update = json.loads(opened.metadata()[FACTS])["update"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return "damaged; remove it, and the same inputs begin anew"
    end = "done" if (state.parent / LORA).is_file() else "stopped; queue the same inputs to go on"
    return f"update {update}, {end}"


class RunFolder:
    """The folder of one run.

    Attributes:
        path: made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lora(self) -> Path:
        """The file of the finished LoRA."""
        return self.path / LORA

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the state.

        Args:
            tensors: by name, on any device.
            facts: whatever JSON holds.
        """
        header = {FACTS: json.dumps(facts)}
        save_whole({name: on_cpu(value) for name, value in tensors.items()}, self.path / STATE, header)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state's tensors and facts; None for a new run.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path / STATE
        if not path.is_file():
            return None
        tensors, header = read_safetensors(path)
        return tensors, json.loads(header[FACTS])

    def save_part(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the trajectories that were recorded as batch ``number``."""
        save_whole({name: on_cpu(value) for name, value in tensors.items()}, self._part(number), {})

    def load_part(self, number: int) -> dict[str, Tensor] | None:
        """Return the trajectories of batch ``number``; None if they are not recorded.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._part(number)
        return read_safetensors(path)[0] if path.is_file() else None

    def forget_parts(self) -> None:
        """Remove the recorded trajectories: a finished run needs them no more."""
        for path in self.path.glob("trajectories-*.safetensors"):
            path.unlink()

    def _part(self, number: int) -> Path:
        return self.path / f"trajectories-{number:05}.safetensors"


def on_cpu(value: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, which shares memory with no other tensor."""
    return value.detach().to("cpu", copy=True).contiguous()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and its header's strings. The file is not mapped, so it may be replaced at once.

    Raises:
        ValueError: the file is damaged.
    """
    content = path.read_bytes()
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        header: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Remove the folder {path.parent} to begin this distillation anew, or choose "
            f"another name."
        ) from error
    return tensors, header
