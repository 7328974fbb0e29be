"""Backward simulation: the student's own first steps from noise, whose states the student meets when it samples.

Training on noised data alone never shows the student its own mistakes (arXiv 2405.14867, section 4.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..process import Process, broadcast
from .draws import integers, normal
from .shared_batch import Random, shared

NEAR = 1 / 16  # of the schedule: a start this near to a timestep of a run is reached by that run


def path_to(process: Process, t: float, steps: int) -> list[float]:
    """Return the timesteps of a run of ``steps`` up to a start ``t``: 999, 749, ``t`` for 4 steps and t = 499.

    The last one is ``t`` itself, in the place of the run's timestep that is nearest to it.
    """
    nearest = math.floor((1 - process.fraction(t)) * steps + 0.5)
    return [process.timestep(1 - index / steps) for index in range(max(1, min(nearest, steps - 1)))] + [t]


def runs_to(process: Process, t: float, steps: Sequence[int]) -> list[int]:
    """Return those of the step counts whose runs come by ``t``; the largest where none does."""
    fraction = process.fraction(t)
    found = [count for count in steps if any(abs(fraction - index / count) < NEAR for index in range(1, count))]
    return found or [max(steps)]


def draw_paths(
    process: Process, starts: Sequence[float], steps: Sequence[int], generator: torch.Generator
) -> list[list[float]]:
    """Return a path of timesteps to each start, of a run with one of the step counts; drawn where several come by."""
    paths = []
    for t in starts:
        runs = runs_to(process, t, steps)
        paths.append(path_to(process, t, runs[int(integers(0, len(runs) - 1, 1, generator))]))
    return paths


@torch.no_grad()
def simulate(
    predict_z0: Callable[[Tensor, Tensor, Tensor], Tensor],
    process: Process,
    noise: Tensor,
    paths: Sequence[Sequence[float]],
    stochasticity: float,
    generator: Random,
) -> Tensor:
    """Return the states (B, C, H, W) at the ends of the paths, sampled as :func:`~..sampler.few_step_sample` does.

    Args:
        predict_z0: ``(z (b, ...), t (b,), rows (b,)) -> z0``; ``rows`` are the samples that are asked for.
        noise: (B, C, H, W) the states at the beginnings of the paths.
        paths: of each sample, of all processes that share the batch, descending timesteps.
        stochasticity: share of fresh noise between steps.
    """
    z, batch = noise.clone(), shared(generator, len(noise))
    here = [paths[position] for position in batch.own]
    for step in range(max(map(len, paths), default=1) - 1):
        going, part = batch.part([step + 1 < len(path) for path in paths])
        rows = torch.tensor(going, device=z.device)
        # A path that has ended stays where it is: its process computes a step in the place of samples of others.
        ends = [here[row][min(step, len(here[row]) - 1) :] for row in going]
        t, t_next = (torch.tensor([path[min(k, len(path) - 1)] for path in ends], device=z.device) for k in (0, 1))
        now = z[rows]
        moved = renoised(process, now, predict_z0(now, t, rows), t, t_next, stochasticity, part)
        if part.weight:
            z[rows] = moved
    return z


def renoised(
    process: Process,
    z: Tensor,
    z0: Tensor,
    t: Tensor,
    t_next: Tensor,
    stochasticity: float,
    generator: Random,
) -> Tensor:
    """Return the state at ``t_next`` (B,) after the prediction ``z0`` at ``(z, t)``.

    The noise is ``sqrt(1 - s^2)`` of the noise that z0 implies and ``s`` of fresh noise, s = ``stochasticity``.
    """
    alpha, sigma = (broadcast(value, z) for value in process.alpha_sigma(t))
    eps = (z - alpha * z0) / sigma
    if stochasticity > 0:
        eps = (1 - stochasticity**2) ** 0.5 * eps + stochasticity * normal(z, generator)
    return process.add_noise(z0, eps, t_next)
