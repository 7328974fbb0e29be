"""Copies to a device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(value: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device. A copy from the CPU to CUDA passes through pinned memory.

    From ordinary memory such a copy waits until the device has done all that it was asked before.
    """
    target = torch.device(device)
    if target.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(target, non_blocking=True)
    return value.to(target)
