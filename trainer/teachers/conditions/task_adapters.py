"""Teachers of other tasks: a base UNet with a task adapter merged in."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ....flash_core.task_adapter import TaskAdapter, read_task_adapter, with_task_adapter
from ...demo.assets import TASK_ADAPTERS
from ...errors import UserError


def find_task_adapter(name: str) -> TaskAdapter:
    """Return the adapter that a recipe names: a file, or one of the demo's tasks.

    Raises:
        UserError: there is no such adapter.
        LoraError: the file can't be used.
    """
    path = Path(name)
    if path.suffix == ".safetensors":
        return read_task_adapter(path)
    shipped = sorted(file.stem for file in TASK_ADAPTERS.glob("*.safetensors"))
    if name not in shipped:
        raise UserError(
            f"model.task_adapter: there is no adapter {name!r}; expected a .safetensors file, or one of the demo's: "
            f"{', '.join(shipped) or 'none is there; make them with `flash-diffusion demo task-teacher`'}"
        )
    return read_task_adapter(TASK_ADAPTERS / f"{name}.safetensors")


def widened(network: nn.Module, adapter: TaskAdapter, title: str) -> UNet2DConditionModel:
    """Return a copy of the UNet that reads the adapter's channels too, on the same device (meta too).

    Args:
        title: the name of the model, for the message.

    Raises:
        UserError: the adapter was made for another model.
    """
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"model.task_adapter: {title} is no UNet; task adapters need a UNet, so choose "
            "another model or remove model.task_adapter"
        )
    channels = network.config["in_channels"] + adapter.extra_channels
    first = next(network.parameters())
    with torch.device(first.device):
        wide: UNet2DConditionModel = UNet2DConditionModel.from_config(network.config, in_channels=channels)
    nn.Module.to(wide, first.dtype)  # diffusers' own warns of modules to keep in float32, of which there are none
    try:
        weights = with_task_adapter(network.state_dict(), adapter)
    except ValueError as error:
        raise UserError(f"model.task_adapter: {error}") from error
    if not first.is_meta:
        wide.load_state_dict(weights)
    return wide.requires_grad_(False).eval()
