"""The stages of a rehearsal: no weight has values to move, so the meter is told which parts are away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..teachers.in_memory.stages import Stages
from .meter import Meter


class PretendStages(Stages):
    """Tells a meter what is moved on and off the device.

    Args:
        meter: counts what is on the device.
    """

    def __init__(self, device: torch.device, groups: Mapping[str, Sequence[nn.Module]], meter: Meter) -> None:
        super().__init__(device, groups)
        self.meter = meter

    def _place(self, module: nn.Module, *, away: bool) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        (self.meter.leave if away else self.meter.come_back)(tensors)
