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

Solver: TypeAlias = Literal["dpmpp_2m", "dpmpp_3m", "unipc", "ddim", "euler"]

ORDERS: dict[Solver, int] = {"dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 2}  # the others are of first order
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
            sample's second step; ``unipc`` is UniPC (arXiv 2302.04867, B2, order 2): ``dpmpp_2m``, but each evaluation
            also corrects the step that led to it; ``ddim`` (arXiv 2010.02502, eta = 0) and ``euler`` are one formula,
            since Euler on a flow's straight path and DDIM both keep the noise implied by z0.
        observe: ``(index, z)`` before each evaluation, z the (B, ...) latents at that grid point (of ``unipc`` not yet
            corrected); copy what you keep.

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
    left = torch.zeros_like(z)  # the latents that each sample's last step began with
    for index in range(min(begin), steps):
        rows = torch.tensor([row for row, first in enumerate(begin) if first <= index], device=z.device)
        if observe is not None:
            observe(index, z)
        everyone = len(rows) == len(z)
        current = z if everyone else z[rows]
        z0 = predict_z0(current, torch.full((len(current),), timesteps[index], device=z.device), rows)
        if solver == "unipc":
            lengths = [index - first for first in begin if first <= index]
            past = (left, previous, before) if everyone else (left[rows], previous[rows], before[rows])
            current = _corrected(current, z0, past, lengths, alphas, sigmas, index)
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
        reached = _step(current, data, alphas, sigmas, index)
        if everyone:
            z, left, previous, before = reached, current, z0, previous
        else:
            before[rows] = previous[rows]
            z[rows], left[rows], previous[rows] = reached, current, z0
    return z


def _step(z: Tensor, data: Tensor, alphas: Sequence[float], sigmas: Sequence[float], index: int) -> Tensor:
    """Step from grid point ``index`` to the next, with a constant prediction of the data on the way."""
    ratio = sigmas[index + 1] / sigmas[index]
    decay = ratio * alphas[index] / alphas[index + 1]  # exp(-h), h the step in log(alpha/sigma)
    return ratio * z + alphas[index + 1] * (1 - decay) * data


def _corrected(
    z: Tensor,
    z0: Tensor,
    past: tuple[Tensor, Tensor, Tensor],
    lengths: Sequence[int],
    alphas: Sequence[float],
    sigmas: Sequence[float],
    index: int,
) -> Tensor:
    """Make the step to grid point ``index`` again, now that the prediction there is known.

    Args:
        z: (b, ...) where the step led; samples without an earlier step keep it.
        z0: (b, ...) the prediction there.
        past: (b, ...) the latents that the step began with, the prediction there, and the one before.
        lengths: steps that each sample has made.
    """
    begun, last, before = past
    weights = [_corrector_weights(alphas, sigmas, index - 1, min(2, made)) if made else (0.0, 0.0) for made in lengths]
    if not any(new for new, _ in weights):
        return z
    data = last + _column(weights, 0, z0) * (z0 - last) + _column(weights, 1, z0) * (last - before)
    again = broadcast(torch.tensor([new != 0 for new, _ in weights], device=z.device), z)
    return torch.where(again, _step(begun, data, alphas, sigmas, index - 1), z)


def _corrector_weights(alphas: Sequence[float], sigmas: Sequence[float], index: int, order: int) -> tuple[float, float]:
    """Return the weights ``c, a`` of ``z0' + c (z0 - z0') + a (z0' - z0'')`` for the step from ``index``.

    z0 is the prediction after the step, z0' before it, and z0'' one step earlier. A step from alpha = 0, which is
    infinitely long in log(alpha/sigma), is not corrected: (0, 0).
    """
    if alphas[index] == 0:
        return 0.0, 0.0
    if order == 1 or alphas[index - 1] == 0:
        return 0.5, 0.0
    h = _log_snr_step(alphas, sigmas, index)
    r0 = _log_snr_step(alphas, sigmas, index - 1) / h
    first, second = _derivative_integrals(h)
    share = (first - 2 * second) / (1 + r0)
    return first - share, share / r0


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
    first, second = _derivative_integrals(h)
    share, curve = r0 / (r0 + r1), second / (r0 + r1)
    return (first * (1 + share) + curve) / r0, -(first * share + curve) / r1


def _derivative_integrals(h: float) -> tuple[float, float]:
    """Return the integrals of exp(-h) times the first and second derivative of z0 in log(alpha/sigma), over z0's."""
    decay = math.exp(-h)
    return ((decay - 1) / h + 1) / (1 - decay), (0.5 - (decay - 1 + h) / h**2) / (1 - decay)


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
