"""What moves in a rehearsal: no weight has values to move, so the meter is told what is away, and what is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..teachers.in_memory.courier import Courier
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


class PretendCourier(Courier):
    """Tells a meter what is copied to the device.

    Args:
        meter: counts what is on the device.
    """

    def __init__(self, device: torch.device, meter: Meter) -> None:
        super().__init__(device)
        self.meter = meter

    def home(self, tensor: Tensor) -> Tensor:
        """Return the tensor: it has no values yet that could be elsewhere."""
        return tensor

    def _copy(self, here: Tensor | None, waiting: Tensor | None) -> None:
        super()._copy(here, waiting)
        if here is not None and waiting is not None:
            self.meter.cross(here, waiting)
