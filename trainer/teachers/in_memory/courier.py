"""Bring weights that wait in the computer's memory to the device, each for the moment of its product.

While a layer computes, the weight of the layer that followed it the last time is on its way. So two layers' weights are
on the device at once, and no more. A wrong guess costs one copy and changes no value: so it does where threads share a
courier on a CPU.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Way(NamedTuple):
    """Tensors on their way to the device; ``arrived`` is a CUDA event, None where copying has ended already."""

    who: Hashable
    tensors: list[Tensor | None]
    arrived: Any


class Courier:
    """Copies one network's waiting weights to a device.

    Args:
        device: where the network runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        # (layer, True in a backward pass) -> the layer that was asked next, and its tensors
        self._followed_by: dict[tuple[Hashable, bool], tuple[Hashable, tuple[Tensor | None, ...]]] = {}
        self._last: tuple[Hashable, bool] | None = None
        self._way: _Way | None = None

    def home(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it waits: in the computer's memory, pinned where the device is a GPU."""
        waiting = tensor.detach().cpu()
        return waiting.pin_memory() if self._stream is not None else waiting

    def fetch(self, who: Hashable, backward: bool, *tensors: Tensor | None) -> list[Tensor | None]:
        """Return a layer's tensors on the device, and send for those of the layer that followed it the last time.

        Args:
            who: tells layers apart.
            backward: True in a backward pass, whose order is another one.
        """
        arrived = self._arrived()
        here = (
            arrived.tensors if arrived is not None and arrived.who is who else [self._brought(one) for one in tensors]
        )
        if self._last is not None:
            self._followed_by[self._last] = (who, tensors)
        self._last = (who, backward)
        if self._last in self._followed_by:
            self._send(*self._followed_by[self._last])
        return here

    def _arrived(self) -> _Way | None:
        """Return what was sent for. The device waits for it even if nobody asks: its memory is then free again."""
        way, self._way = self._way, None
        if way is not None and way.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(way.arrived)
        return way

    def _send(self, who: Hashable, tensors: tuple[Tensor | None, ...]) -> None:
        # The memory comes from the present stream, in whose order it is used and freed: so what is alive here is all
        # that is alive there, however far the program runs ahead of the device.
        room = [self._room(one) for one in tensors]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for here, waiting in zip(room, tensors, strict=True):
                self._copy(here, waiting)
            arrived = None if self._stream is None else self._stream.record_event()
        self._way = _Way(who, room, arrived)

    def _brought(self, waiting: Tensor | None) -> Tensor | None:
        here = self._room(waiting)
        self._copy(here, waiting)
        return here

    def _room(self, waiting: Tensor | None) -> Tensor | None:
        return None if waiting is None else torch.empty_like(waiting, device=self.device)

    def _copy(self, here: Tensor | None, waiting: Tensor | None) -> None:
        if here is not None and waiting is not None:
            here.copy_(waiting, non_blocking=True)
