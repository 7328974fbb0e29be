"""Task adapters: what makes a text-to-image UNet read further channels, in one small file.

A task adapter holds the weights of the extra input channels and a LoRA on the rest of the network. Merged into the base
it gives a conditional model, with which a teacher of a new task costs some hundred kilobytes instead of a checkpoint.
The same merging serves diffusers' names in the trainer and in the nodes, which read the base in diffusers' names too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lora.container import LoraError, open_container
from .lora.weights import LoraModule, flat_name
from .lora.writing import save_whole

INPUT_LAYER = "conv_in.weight"  # of diffusers' UNets
CHANNELS_KEY = "conv_in.extra"
VERSION_KEY = "flash.task_adapter"
VERSION = "1"


@dataclass(frozen=True)
class TaskAdapter:
    """The weights that a task adds to a base.

    Attributes:
        task: the task's name in recipes.
        options: the settings it was trained with.
        channels: (out, E, kh, kw), the input layer's weights for the E extra channels.
        modules: the LoRA, by any name; paths are diffusers'.
        facts: further strings about its training.
    """

    task: str
    channels: Tensor
    modules: Mapping[str, LoraModule]
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def extra_channels(self) -> int:
        """The number of channels that the task adds to the UNet's input."""
        return int(self.channels.shape[1])


def write_task_adapter(path: str | os.PathLike[str], adapter: TaskAdapter, dtype: torch.dtype = torch.float16) -> None:
    """Write a task adapter, completely or not at all. alpha is folded into the LoRA's up half."""
    tensors = {CHANNELS_KEY: adapter.channels.detach().to("cpu", dtype).contiguous()}
    for module in adapter.modules.values():
        tensors[f"{module.path}.lora_down"] = module.down.detach().to("cpu", dtype).contiguous()
        tensors[f"{module.path}.lora_up"] = (module.up.detach().float() * module.scale).to("cpu", dtype).contiguous()
    header = {
        **adapter.facts,
        VERSION_KEY: VERSION,
        "flash.task": adapter.task,
        "flash.task_options": json.dumps(adapter.options),
    }
    save_whole(tensors, Path(path), header)


def read_task_adapter(path: str | os.PathLike[str]) -> TaskAdapter:
    """Read a task adapter; only safetensors.

    Raises:
        LoraError: no such file, damaged, or not a task adapter.
    """
    container = open_container(Path(path))
    header = container.header
    if header.get(VERSION_KEY) != VERSION or CHANNELS_KEY not in container.shapes:
        raise LoraError(
            f"{container.path.name} is not a task adapter of version {VERSION}; expected a file that "
            "`flash-diffusion demo task-teacher` wrote"
        )
    tensors = {key: value.float() for key, value in container.tensors(container.shapes).items()}
    channels = tensors.pop(CHANNELS_KEY)
    modules = {}
    for key, down in tensors.items():
        layer, _, half = key.rpartition(".")
        if half != "lora_down":
            continue
        up = tensors.get(f"{layer}.lora_up")
        if up is None or up.shape[1] != down.shape[0]:
            raise LoraError(
                f"{container.path.name}: layer {layer} has no up half, or one of another rank; make the file again"
            )
        modules[flat_name(layer)] = LoraModule(layer, down, up)
    facts = {key: value for key, value in header.items() if not key.startswith("flash.task")}
    return TaskAdapter(header["flash.task"], channels, modules, json.loads(header["flash.task_options"]), facts)


@torch.no_grad()
def with_task_adapter(weights: Mapping[str, Tensor], adapter: TaskAdapter) -> dict[str, Tensor]:
    """Return a UNet's weights with a task adapter merged in.

    Args:
        weights: the base's, by diffusers' names; not changed.

    Returns:
        The same names; the input layer reads E channels more, behind the others.

    Raises:
        ValueError: the adapter is for another base; says which layer does not fit.
    """
    merged = dict(weights)
    first = merged.get(INPUT_LAYER)
    if first is None or first.shape[0] != adapter.channels.shape[0] or first.shape[2:] != adapter.channels.shape[2:]:
        found = "no such layer" if first is None else str(tuple(first.shape))
        raise ValueError(
            f"the task adapter ({adapter.task}) adds channels of {tuple(adapter.channels.shape)} to {INPUT_LAYER}, but "
            f"the model has {found}; use the base that it was trained for"
        )
    merged[INPUT_LAYER] = torch.cat([first, adapter.channels.to(first)], dim=1)
    for module in adapter.modules.values():
        name = f"{module.path}.weight"
        weight = merged.get(name)
        if weight is None or weight.numel() != module.up.shape[0] * module.down[0].numel():
            found = "no such layer" if weight is None else str(tuple(weight.shape))
            raise ValueError(
                f"the task adapter ({adapter.task}) changes {module.path} as {module.shape}, but the model has "
                f"{found}; use the base that it was trained for"
            )
        merged[name] = (weight.float() + module.update().to(weight.device).view_as(weight)).to(weight.dtype)
    return merged
