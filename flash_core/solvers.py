"""The teacher's ODE solvers, over a batch in which every sample may join at its own index of the grid.

All of them are written with data predictions (z0), so they need no knowledge of what the network outputs, and every
coefficient is a ratio of alphas and sigmas, so that they hold where alpha is 0 (zero terminal SNR, flow at s = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .process import Process, broadcast

Solver: TypeAlias = Literal["dpmpp_2m", "dpmpp_3m", "ddim", "euler"]

ORDERS: dict[Solver, int] = {"dpmpp_2m": 2, "dpmpp_3m": 3}  # the others are of first order
FEW_STEPS = 15  # below, the third order ends with one step of second order, as diffusers' does

PredictZ0: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(z (b, ...), t (b,), samples (b,)) -> z0 (b, ...)``; ``samples`` are the rows of the batch that are asked for."""


def solve(
    predict_z0: PredictZ0,
    process: Process,
    z: Tensor,
    timesteps: Sequence[float],
    start: Sequence[int] | None = None,
    solver: Solver = "dpmpp_2m",
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Solve the probability-flow ODE from ``timesteps[start]`` down to the clean latent.

    Args:
        predict_z0: called once per grid point with the samples that have started by then, in one batch.
        z: (B, ...) latents, each at the noise level of its own start.
        timesteps: the grid, descending, K values.
        start: each sample's first index, in 0..K-1 (default: 0 for all). Python numbers, so that nothing waits for the
            device.
        solver: ``dpmpp_2m`` is DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), first order at a sample's own first
            step and at the last; ``dpmpp_3m`` is its third order (the same paper's appendix B), second order at a
            sample's second step; ``ddim`` (arXiv 2010.02502, eta = 0) and ``euler`` are one formula, since Euler on a
            flow's straight path and DDIM both keep the noise implied by z0.
        observe: ``(index, z)`` before each evaluation, z the (B, ...) latents at that grid point; copy what you keep.

    Returns:
        (B, ...) latents at t = 0.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"unknown solver {solver!r}; expected one of {', '.join(get_args(Solver))}")
    steps = len(timesteps)
    begin = [0] * len(z) if start is None else [int(index) for index in start]
    if len(begin) != len(z) or any(not 0 <= index < steps for index in begin):
        raise ValueError(f"start must hold {len(z)} indices in 0..{steps - 1}, got {begin}")
    alphas, sigmas = levels(process, timesteps)
    z = z.clone()
    previous, before = torch.zeros_like(z), torch.zeros_like(z)
    for index in range(min(begin), steps):
        rows = torch.tensor([row for row, first in enumerate(begin) if first <= index], device=z.device)
        if observe is not None:
            observe(index, z)
        everyone = len(rows) == len(z)
        current = z if everyone else z[rows]
        z0 = predict_z0(current, torch.full((len(current),), timesteps[index], device=z.device), rows)
        ratio = sigmas[index + 1] / sigmas[index]
        decay = ratio * alphas[index] / alphas[index + 1]  # exp(-h), h the step in log(alpha/sigma)
        weights = [
            _history_weights(alphas, sigmas, index, min(_highest_order(solver, index, steps), 1 + index - first))
            for first in begin
            if first <= index
        ]
        data = z0
        if any(weight for weight, _ in weights):
            last = previous if everyone else previous[rows]
            data = z0 + _column(weights, 0, z0) * (z0 - last)
            if any(weight for _, weight in weights):
                data = data + _column(weights, 1, z0) * (last - (before if everyone else before[rows]))
        current = ratio * current + alphas[index + 1] * (1 - decay) * data
        if everyone:
            z, previous, before = current, z0, previous
        else:
            before[rows] = previous[rows]
            z[rows], previous[rows] = current, z0
    return z


def _highest_order(solver: Solver, index: int, steps: int) -> int:
    """Return the order of a step: the solver's, but first at the last step, whose end has no noise."""
    order = ORDERS.get(solver, 1)
    if index == steps - 1:
        return 1
    return min(order, 2) if index == steps - 2 and steps < FEW_STEPS else order


def _history_weights(alphas: Sequence[float], sigmas: Sequence[float], index: int, order: int) -> tuple[float, float]:
    """Return the weights ``a, b`` of ``z0 + a (z0 - z0') + b (z0' - z0'')``, the last predictions being z0' and z0''.

    Where alpha was 0 at an earlier point, the step in log(alpha/sigma) from there is infinite, and the order lower.
    """
    known = next((count for count in range(1, order) if alphas[index - count] == 0), order)
    if known == 1:
        return 0.0, 0.0
    h = _log_snr_step(alphas, sigmas, index)
    r0 = _log_snr_step(alphas, sigmas, index - 1) / h
    if known == 2:
        return 0.5 / r0, 0.0
    r1 = _log_snr_step(alphas, sigmas, index - 2) / h
    # The integrals of exp(-h) times the first and the second derivative of z0 in log(alpha/sigma), over that of z0.
    decay = math.exp(-h)
    first = ((decay - 1) / h + 1) / (1 - decay)
    second = (0.5 - (decay - 1 + h) / h**2) / (1 - decay)
    share, curve = r0 / (r0 + r1), second / (r0 + r1)
    return (first * (1 + share) + curve) / r0, -(first * share + curve) / r1


def _column(weights: Sequence[tuple[float, float]], which: int, like: Tensor) -> Tensor:
    """Return one weight of each sample (B, 1, ...), as a factor of ``like``."""
    return broadcast(torch.tensor([pair[which] for pair in weights], device=like.device), like)


def levels(process: Process, timesteps: Sequence[float]) -> tuple[list[float], list[float]]:
    """``alpha`` and ``sigma`` along a grid as floats, with the clean end ``(1, 0)`` appended."""
    alpha, sigma = process.alpha_sigma(torch.tensor(list(timesteps), dtype=torch.float64))
    return [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0]


def _log_snr_step(alphas: Sequence[float], sigmas: Sequence[float], index: int) -> float:
    """The step of ``log(alpha/sigma)`` from grid point ``index`` to the next; both must lie inside (0, 1)."""
    return math.log(alphas[index + 1] * sigmas[index] / (sigmas[index + 1] * alphas[index]))
