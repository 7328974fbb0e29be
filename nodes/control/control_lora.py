"""Control-LoRAs on the base model's own weights, whatever LoRAs are patched into the model.

A Control-LoRA is a ControlNet whose weights are the base model's weights plus a low-rank update. ComfyUI takes the
model's weights as they are loaded, with every LoRA patched in. Then a Flash LoRA also changes the ControlNet, although
the ControlNet was trained without this LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.controlnet
import comfy.utils
from torch import Tensor

HINT_LAYERS = tuple(f"input_hint_block.{index}" for index in range(0, 15, 2))  # there is a SiLU between them
MIDDLE = "middle_block_out.0"
NETWORK = "diffusion_model."  # the prefix of the network's weights in ComfyUI's models


class BaseControlLora(comfy.controlnet.ControlLora):
    """ComfyUI's Control-LoRA with the base model's own weights."""

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Build the network for a run, with the original of each patched weight.

        The model's patcher keeps the original of each weight that a LoRA has changed. Weights that are patched on the
        fly (low VRAM, dynamic VRAM) are still the originals. No weight is copied: an original stays where the patcher
        keeps it, and moves to the device only while it is used.
        """
        super().pre_run(model, percent_to_timestep_function)
        patcher = model.current_patcher
        if patcher is None:
            return
        parameters = dict(self.control_model.named_parameters())
        for key, kept in patcher.backup.items():
            name = key.removeprefix(NETWORK)
            if name in self.control_weights or name not in parameters:
                continue
            weight = kept.weight
            module = self.control_model.get_submodule(name.rpartition(".")[0])
            if not isinstance(module, comfy.controlnet.ControlLoraOps.Linear | comfy.controlnet.ControlLoraOps.Conv2d):
                weight = weight.to(
                    parameters[name].device
                )  # other layers (all small) do not move their weights themselves
            comfy.utils.set_attr_param(self.control_model, name, weight)

    def copy(self) -> BaseControlLora:
        """Copy with the same hint, strength and window."""
        copied = BaseControlLora(self.control_weights, global_average_pooling=self.global_average_pooling)
        self.copy_to(copied)
        return copied


def check_control_lora(weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a layer that only the ControlNet has, or half of an update, is missing.

    ComfyUI takes missing weights from the base model; a layer that the base model lacks would have no weight.
    """
    numbers = {int(name.split(".")[1]) for name in weights if name.startswith("zero_convs.")}
    own = [*HINT_LAYERS, *(f"zero_convs.{number}.0" for number in range(max(numbers, default=0) + 1)), MIDDLE]
    for layer in own:
        if f"{layer}.weight" not in weights and f"{layer}.up" not in weights:
            raise ValueError(f"the Control-LoRA has no weight {layer}.weight; download the file again")
    for name, up in weights.items():
        layer, _, half = name.rpartition(".")
        if half != "up":
            continue
        down = weights.get(f"{layer}.down")
        if down is None or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"the Control-LoRA's layer {layer} has no down half, or the halves do not fit; download the file again"
            )
