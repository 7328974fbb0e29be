"""AdamW for what a run trains: moments in 32 bits by torch, or in 8 bits by bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import OptimizerSection
from ..errors import UserError


def adamw(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], section: OptimizerSection
) -> torch.optim.Optimizer:
    """Return AdamW with ``section``'s weight decay and bits.

    Raises:
        UserError: 8 bits, and bitsandbytes is not installed.
    """
    if section.bits == 8:
        return _eight_bits(parameters, lr, betas, section)
    fused = not any(value.is_meta for value in parameters.values())  # a rehearsal's device has no kernels
    return torch.optim.AdamW(parameters.values(), lr, betas, weight_decay=section.weight_decay, fused=fused)


def _eight_bits(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], section: OptimizerSection
) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"optimizer.bits: 8 needs bitsandbytes, which can't be imported here ({error}); install it with "
            "`pip install 'flash-diffusion[memory]'`, or set optimizer.bits to 32"
        ) from error

    class Resumable(AdamW8bit):  # type: ignore[misc]  # without types
        """Gives a checkpoint flat tensors, where the library nests them; counts steps in integers again."""

        def state_dict(self) -> dict[str, Any]:
            return torch.optim.Optimizer.state_dict(self)

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            super().load_state_dict(state_dict, move_to_device)
            for state in self.state.values():
                state["step"] = int(state["step"])

    made: torch.optim.Optimizer = Resumable(parameters.values(), lr, betas, weight_decay=section.weight_decay)
    return made
