"""Control-LoRAs on the model that they were trained on, whatever LoRAs the model carries in the run.

A Control-LoRA is a ControlNet whose weights are the base model's plus a low-rank update. ComfyUI takes the model's as
they are loaded, with every LoRA patched in. A Flash LoRA then changes the ControlNet too, by more the stronger it is,
though the ControlNet was trained without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.controlnet
import comfy.utils
from torch import Tensor

HINT = "input_hint_block.0.weight"
NETWORK = "diffusion_model."  # of ComfyUI's models, within the names of their weights


class BaseControlLora(comfy.controlnet.ControlLora):
    """ComfyUI's Control-LoRA, on the base model's own weights."""

    def pre_run(self, model: Any, percent_to_timestep_function: Callable[[float], float]) -> None:
        """Put the network together for a run.

        Where a LoRA is patched in, the model's patcher keeps the original; it takes the place of the patched weight.
        Weights that are patched on the fly (low VRAM, dynamic VRAM) lie in the model as they were. Nothing is copied:
        an original stays in the memory where it is kept, and is moved while it is used.
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
                weight = weight.to(parameters[name].device)  # other layers, all of them small, move nothing themselves
            comfy.utils.set_attr_param(self.control_model, name, weight)

    def copy(self) -> BaseControlLora:
        """With the same hint, strength and window."""
        copied = BaseControlLora(self.control_weights, global_average_pooling=self.global_average_pooling)
        self.copy_to(copied)
        return copied


def check_control_lora(weights: Mapping[str, Tensor]) -> None:
    """Raise where a Control-LoRA's weights are incomplete.

    Raises:
        ValueError: it lacks the way in for the hint, or half of an update.
    """
    if HINT not in weights:
        raise ValueError(f"a Control-LoRA without {HINT}")
    for name, up in weights.items():
        layer, _, half = name.rpartition(".")
        if half != "up":
            continue
        down = weights.get(f"{layer}.down")
        if down is None or up.shape[1] != down.shape[0]:
            raise ValueError(f"a Control-LoRA whose {layer} lacks its down half, or it does not fit")
