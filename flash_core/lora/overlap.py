"""Measure how far two LoRAs change the same layers in the same directions, from their factors.

For the updates ``A = s u d`` and ``B = s' u' d'`` of one layer, ``<A, B> = s s' sum((u.T u') * (d d'.T))`` (Frobenius),
and the part of B inside A's directions is ``P B Q``, with the projections P and Q onto A's column and row space. The
memory is of order ``(out + in) r + r^2``, as in :mod:`.algebra`: no full update is made.

    |<A, B>| / ||A||  <=  ||P B Q||  <=  ||B||

The size ``||B|| / ||A||`` on the layers that both change is the best sign that a style disturbs a Flash LoRA. On
the demo, the one-step picture's squared error against the styled teacher, as a share of the latents' variance
(``benchmarks/style_strength.py``; a style of 817 updates, rank 6):

    size                       0     .36    .72    1.0    1.1    1.4
    a trained style          .04     .12    .29           .59    .77
    random directions        .04                   .46
    the Flash LoRA's own     .04                          .16

At the same size, an update in the Flash LoRA's own directions disturbs it less. So the report shows the directions, but
the suggested strength depends on the size only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .matching import same_weight
from .names import with_diffusers_names
from .weights import LoraModule, flat_name

# From here on a style outweighs the Flash LoRA, and the demo's few-step pictures lose half of their variance to it.
SIZE_LIMIT = 1.0


@dataclass(frozen=True)
class LayerOverlap:
    """One layer that both LoRAs change.

    Attributes:
        first, second: the updates' norms (Frobenius, strengths included).
        inner: ``<A, B>``.
        inside: ``||P B Q||``, the norm of the second update inside the first update's directions.
    """

    first: float
    second: float
    inner: float
    inside: float


@dataclass(frozen=True)
class Overlap:
    """Two LoRAs compared over the layers that both change.

    Attributes:
        layers: by common name (:func:`common_names`).
        others: the number of layers that only the second LoRA changes.
    """

    layers: Mapping[str, LayerOverlap]
    others: int

    @property
    def first(self) -> float:
        """The norm of the first LoRA over the shared layers."""
        return math.hypot(*(layer.first for layer in self.layers.values()))

    @property
    def second(self) -> float:
        """The norm of the second LoRA over the shared layers."""
        return math.hypot(*(layer.second for layer in self.layers.values()))

    @property
    def size(self) -> float:
        """``second / first``; 0 if the first LoRA changes nothing."""
        return self.second / self.first if self.first else 0.0

    @property
    def cosine(self) -> float:
        """In -1..1: 1 for the same update, -1 for the opposite update, 0 without shared layers."""
        inner = sum(layer.inner for layer in self.layers.values())
        both = self.first * self.second
        return max(-1.0, min(1.0, inner / both)) if both else 0.0

    @property
    def inside(self) -> float:
        """The share of the second update in the first update's directions, ``||P B Q|| / ||B||``, in 0..1."""
        inside = math.hypot(*(layer.inside for layer in self.layers.values()))
        return min(1.0, inside / self.second) if self.second else 0.0

    @property
    def largest(self) -> str | None:
        """The layer that the second LoRA changes most; None without shared layers."""
        return max(self.layers, key=lambda name: self.layers[name].second, default=None)


def overlap(
    first: Mapping[str, LoraModule],
    second: Mapping[str, LoraModule],
    first_strength: float = 1.0,
    second_strength: float = 1.0,
) -> Overlap:
    """Measure the layers that two LoRAs share.

    Args:
        first, second: layers by common names; those of different shapes are not shared.
    """
    layers = {}
    for name, one, other in _shared(first, second):
        up, down = _halves(one, first_strength)
        other_up, other_down = _halves(other, second_strength)
        columns, rows = _directions(up, down)
        layers[name] = LayerOverlap(
            first=_norm(up, down),
            second=_norm(other_up, other_down),
            inner=_inner(up, down, other_up, other_down),
            inside=float(torch.linalg.matrix_norm((columns.T @ other_up) @ (other_down @ rows))),
        )
    return Overlap(layers, len(second) - len(layers))


def cosine(first: Mapping[str, LoraModule], second: Mapping[str, LoraModule]) -> float:
    """Return ``<A, B> / (||A|| ||B||)`` over all layers of both LoRAs, in -1..1; 0 if one LoRA changes nothing.

    A layer that only one LoRA has counts as 0 in the other.
    """
    inner = sum(_inner(*_halves(one), *_halves(other)) for _, one, other in _shared(first, second))
    both = norm(first) * norm(second)
    return max(-1.0, min(1.0, inner / both)) if both else 0.0


def norm(modules: Mapping[str, LoraModule]) -> float:
    """Return a LoRA's norm over all its layers, at strength 1."""
    return math.hypot(*(_norm(*_halves(module)) for module in modules.values()))


def suggested_strength(strength: float, size: float, limit: float = SIZE_LIMIT) -> float:
    """Return the strength at which the size (:attr:`Overlap.size`, measured at ``strength``) is within the limit.

    The size is proportional to the strength. Rounded towards 0, to hundredths, as widgets are.
    """
    if size <= limit:
        return strength
    return math.copysign(math.floor(100 * abs(strength) * limit / size) / 100, strength)


def common_names(modules: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """Return the layers by diffusers' names in :func:`~.weights.flat_name`'s spelling, from any dialect.

    Layers of a network without known diffusers' names keep their own names.
    """
    try:
        return {flat_name(path): module for path, module in with_diffusers_names(modules).items()}
    except ValueError:
        return dict(modules)


def _shared(
    first: Mapping[str, LoraModule], second: Mapping[str, LoraModule]
) -> Iterator[tuple[str, LoraModule, LoraModule]]:
    for name, one in first.items():
        other = second.get(name)
        if other is not None and same_weight(one.shape, other.shape):
            yield name, one, other


def _halves(module: LoraModule, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the halves (out, r), with scale and strength multiplied in, and (r, in)."""
    return module.up.float().flatten(1) * (module.scale * strength), module.down.float().flatten(1)


def _inner(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> float:
    return float(((up.T @ other_up) * (down @ other_down.T)).double().sum())


def _norm(up: Tensor, down: Tensor) -> float:
    return math.sqrt(max(0.0, _inner(up, down, up, down)))


def _directions(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of ``up @ down``'s column space (out, k) and row space (in, k); k is its true rank."""
    # up = Qu Ru, down' = Qd Rd: the singular vectors of up down are those of the small matrix Ru Rd' in these bases.
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.T)
    left, singular, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    noise = singular.max() * torch.finfo(singular.dtype).eps * max(len(up), down.shape[1])
    keep = singular > noise
    return up_basis @ left[:, keep], down_basis @ right[keep].T
