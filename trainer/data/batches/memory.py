"""The memory of the student's last outputs, from which the critic's batches are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ....flash_core.terms.draws import integers
from ....flash_core.terms.shared_batch import Random, generator_of

LATENTS = "z"
RESIDUALS = "residuals"


class OutputMemory:
    """A first-in, first-out memory of N outputs with their conditions.

    Outputs stay in the batches in which they came, because batches of several sizes cannot be joined.

    Args:
        capacity: N, the outputs that are kept; the oldest ones go first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._batches: list[tuple[Tensor, Conditioning]] = []

    def __len__(self) -> int:
        return sum(len(z) for z, _ in self._batches)

    def add(self, z: Tensor, conditioning: Conditioning) -> None:
        """Add outputs (b, C, H, W) with their conditions."""
        if len(z):
            self._batches.append((z, conditioning))
        while (spare := len(self) - self.capacity) > 0:
            oldest, conditions = self._batches.pop(0)
            if spare < len(oldest):
                keep = torch.arange(spare, len(oldest), device=oldest.device)
                self._batches.insert(0, (oldest[keep], conditions.rows(keep)))

    def draw(self, count: int, generator: Random) -> tuple[Tensor, Conditioning]:
        """Return ``count`` outputs of one size, drawn uniformly with replacement, with their conditions.

        The first draw decides the size: sizes come as often as they are in the memory.

        Raises:
            ValueError: the memory is empty.
        """
        if not self._batches:
            raise ValueError("the memory is empty: add outputs before drawing")
        first = int(integers(0, len(self) - 1, 1, generator_of(generator)))
        batch = next(batch for batch, place in self._places() if place == first)
        size = _size(*self._batches[batch])
        alike = [place for place in self._places() if _size(*self._batches[place[0]]) == size]
        drawn = integers(0, len(alike) - 1, count, generator).tolist()
        rows = [self._row(*alike[index]) for index in drawn]
        return torch.cat([z for z, _ in rows]), Conditioning.cat([conditioning for _, conditioning in rows])

    def _places(self) -> list[tuple[int, int]]:
        """Return (batch, place in the whole memory) of every output."""
        owners = [batch for batch, (z, _) in enumerate(self._batches) for _ in range(len(z))]
        return [(batch, place) for place, batch in enumerate(owners)]

    def _row(self, batch: int, place: int) -> tuple[Tensor, Conditioning]:
        z, conditioning = self._batches[batch]
        index = torch.tensor([place - sum(len(before) for before, _ in self._batches[:batch])], device=z.device)
        return z[index], conditioning.rows(index)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return all outputs and conditions, for a checkpoint."""
        return {
            f"{number:06d}/{name}": value
            for number, batch in enumerate(self._batches)
            for name, value in _tensors(*batch).items()
        }

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Set what :meth:`state` returned."""
        batches: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            number, _, part = name.partition("/")
            batches.setdefault(number, {})[part] = value.to(device)
        self._batches = [_batch(batches[number]) for number in sorted(batches)]


def _tensors(z: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
    """Return the tensors of a batch by name."""
    parts = {field.name: getattr(conditioning, field.name) for field in fields(conditioning)}
    residuals = parts.pop(RESIDUALS)
    named = {name: value for name, value in parts.items() if value is not None}
    return {LATENTS: z, **named, **{f"{RESIDUALS}/{index:03d}": value for index, value in enumerate(residuals)}}


def _batch(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Conditioning]:
    """Return the batch of :func:`_tensors`."""
    residuals = tuple(tensors[name] for name in sorted(tensors) if name.startswith(f"{RESIDUALS}/"))
    named = {name: value for name, value in tensors.items() if name != LATENTS and "/" not in name}
    return tensors[LATENTS], Conditioning(**named, residuals=residuals)


def _size(z: Tensor, conditioning: Conditioning) -> tuple[tuple[str, torch.Size], ...]:
    """Return what outputs must share to be one batch: the shapes of their latents and conditions."""
    return tuple((name, value.shape[1:]) for name, value in _tensors(z, conditioning).items())
