"""Sums and truncations of LoRAs, computed on the factors: no layer's full update is ever made.

For a layer of shape (out, in) and rank r everything here takes memory of order ``(out + in) r + r^2``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .matching import same_weight
from .weights import LoraModule, computable


@dataclass(frozen=True)
class Truncation:
    """LoRA layers cut to a lower rank, with the error of the cut.

    Attributes:
        modules: the layers by their names.
        error: ``||new - old|| / ||old||`` over all layers, Frobenius; 0 where nothing was cut.
        worst: the layer with the largest error.
        worst_error: the error of the worst layer.
    """

    modules: dict[str, LoraModule]
    error: float
    worst: str
    worst_error: float


def resize(modules: Mapping[str, LoraModule], rank: int) -> Truncation:
    """Return the nearest updates (Frobenius) of at most ``rank``; layers of this rank or less do not change.

    The halves of a cut layer are balanced, ``up = U sqrt(S)``, ``down = sqrt(S) V``, and its scale stays.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank should be at least 1, but is {rank}")
    resized: dict[str, LoraModule] = {}
    lost = total = 0.0
    worst, worst_error = "", -1.0
    for name, module in modules.items():
        resized[name], squares, cut = _truncate(module, rank)
        lost, total = lost + cut, total + squares
        error = math.sqrt(cut / squares) if squares else 0.0
        if error > worst_error:
            worst, worst_error = name, error
    return Truncation(resized, math.sqrt(lost / total) if total else 0.0, worst, max(worst_error, 0.0))


def merge(loras: Sequence[tuple[Mapping[str, LoraModule], float]]) -> dict[str, LoraModule]:
    """Return the exact weighted sum ``[w1 s1 u1, w2 s2 u2] [d1; d2]`` of LoRAs, at scale 1 and the sum of the ranks.

    Args:
        loras: layers by common names, and each LoRA's weight.

    Raises:
        ValueError: a layer has different shapes in two LoRAs.
    """
    merged: dict[str, LoraModule] = {}
    parts: dict[str, list[tuple[LoraModule, float]]] = {}
    for modules, weight in loras:
        for name, module in modules.items():
            parts.setdefault(name, []).append((module, weight))
    for name, terms in parts.items():
        first = terms[0][0]
        for module, _ in terms[1:]:
            if not same_weight(first.shape, module.shape):
                raise ValueError(
                    f"layer {name} has the shape {first.shape} in one LoRA and {module.shape} in another: "
                    "they were made for different models"
                )
        down = torch.cat([module.down.float().reshape(-1, *first.down.shape[1:]) for module, _ in terms])
        ups = [module.up.float().reshape(*first.up.shape[:1], -1, *first.up.shape[2:]) for module, _ in terms]
        scaled = [up * (module.scale * weight) for up, (module, weight) in zip(ups, terms, strict=True)]
        merged[name] = LoraModule(first.path, down, torch.cat(scaled, dim=1), float(down.shape[0]))
    return merged


def _truncate(module: LoraModule, rank: int) -> tuple[LoraModule, float, float]:
    """Return the layer at ``rank``, its squared norm, and the squared norm of the cut part."""
    up, down = module.up.float().flatten(1), module.down.float().flatten(1)
    if module.rank <= rank:  # ||u d||^2 = <u'u, d d'>
        return module, module.scale**2 * float(((up.T @ up) * (down @ down.T)).double().sum()), 0.0
    # up = Qu Ru, down' = Qd Rd: the singular values of up down are those of the small matrix Ru Rd'.
    up_basis, up_core = torch.linalg.qr(up)
    down_basis, down_core = torch.linalg.qr(down.T)
    left, singular, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
    squares = (module.scale * singular.double()) ** 2
    keep = min(rank, singular.numel())
    root = singular[:keep].sqrt()
    new_up = (up_basis @ left[:, :keep]) * root
    new_down = root[:, None] * (right[:keep] @ down_basis.T)
    cut = replace(
        module,
        up=_as(new_up.reshape(module.up.shape[0], keep, *module.up.shape[2:]), module.up),
        down=_as(new_down.reshape(keep, *module.down.shape[1:]), module.down),
        alpha=module.scale * keep,
    )
    return cut, float(squares.sum()), float(squares[keep:].sum())


def _as(half: Tensor, like: Tensor) -> Tensor:
    return half.to(computable(like.dtype)).contiguous()
