"""An 8-bit AdamW without values: it has the state of bitsandbytes' AdamW8bit, which need not be installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...config import OptimizerSection
from ...distill.assembly import adamw

# bitsandbytes (optim.optimizer): values that share a factor, and the least size of a tensor that is kept in 8 bits.
BLOCK, LEAST = 256, 4096


def pretend_adamw(
    parameters: Mapping[str, nn.Parameter], lr: float, betas: tuple[float, float], section: OptimizerSection
) -> torch.optim.Optimizer:
    """Return the run's AdamW; one of 8 bits has only its state."""
    if section.bits == 8:
        return PretendAdamW8bit(parameters.values(), {"lr": lr})
    return adamw(parameters, lr, betas, section)


class PretendAdamW8bit(torch.optim.Optimizer):
    """Makes the state of bitsandbytes' AdamW8bit at its first step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state of every parameter with a gradient that has none."""
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None or self.state[value]:
                    continue
                small = value.numel() < LEAST
                moments = {
                    name: torch.zeros_like(value, dtype=torch.float32 if small else torch.uint8) for name in "12"
                }
                self.state[value] |= {f"state{name}": moment for name, moment in moments.items()}
                if not small:
                    blocks = -(-value.numel() // BLOCK)
                    self.state[value] |= {
                        f"absmax{name}": value.new_zeros(blocks, dtype=torch.float32) for name in "12"
                    }
