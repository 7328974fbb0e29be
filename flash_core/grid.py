"""Timestep grids: the trailing grid, where training puts its weight on it, and ``denoise`` snapped to it.

A grid is a list of timesteps from noise to image. Index ``k = 0`` is pure noise; the step after the last lands on z0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .process import Process

# Four modes at t = 999, 749, 499, 249 and a narrow bell around each (arXiv 2406.02347, section 4.1).
NUM_MODES = 4
MIXTURE_TWICE_VARIANCE = 0.5

MAX_FEW_STEPS = 8


def trailing_fractions(steps: int) -> list[float]:
    """``1, (N-1)/N, ..., 1/N``: the trailing spacing of ``steps`` evaluations, as fractions of the schedule."""
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}")
    return [(steps - index) / steps for index in range(steps)]


def trailing_timesteps(process: Process, steps: int) -> list[float]:
    """The trailing grid of a process: 999, 749, 499, 249 for four steps of a variance-preserving one."""
    return [process.timestep(fraction) for fraction in trailing_fractions(steps)]


def snapped_fractions(steps: int, denoise: float) -> list[float]:
    """The fractions of the schedule that a few-step model evaluates for image-to-image.

    ``denoise`` in (0, 1] is snapped to the nearest timestep the model was trained on: the four modes and the trailing
    grid of ``steps``. Of the ``steps`` evaluations of a full run about ``steps * denoise`` remain (at least one), each
    at a trained timestep: 4 steps at denoise .5 evaluate t = 499 and 249, not four timesteps it has never seen.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}")
    trained = sorted({*trailing_fractions(steps), *trailing_fractions(NUM_MODES)})
    start = min(trained, key=lambda fraction: (abs(fraction - denoise), fraction))
    count = max(1, math.floor(steps * start + 0.5))
    allowed = [fraction for fraction in trained if fraction <= start]
    wanted = [start * (count - index) / count for index in range(count)]
    snapped = {min(allowed, key=lambda fraction: (abs(fraction - value), fraction)) for value in wanted}
    return sorted(snapped, reverse=True)


def snapped_timesteps(process: Process, steps: int, denoise: float = 1.0) -> list[float]:
    """:func:`snapped_fractions` as timesteps of ``process``; the trailing grid where ``denoise`` is 1."""
    return [process.timestep(fraction) for fraction in snapped_fractions(steps, denoise)]


def timestep_mixture(
    teacher_steps: int, beta: Sequence[float], twice_variance: float = MIXTURE_TWICE_VARIANCE
) -> Tensor:
    """The training distribution ``pi(k)`` over the K indices of the teacher's grid, (K,) float64, summing to 1.

    ``pi(k) ~ sum_i beta_i exp(-(k - mu_i)^2 / twice_variance)`` with ``mu_i = i K / len(beta)``
    (arXiv 2406.02347, section 4.1).

    Args:
        teacher_steps: K, a multiple of ``len(beta)`` so that the modes lie on the grid.
        beta: the weight of each mode from pure noise on; not negative, not all 0.
    """
    weights = torch.tensor(list(beta), dtype=torch.float64)
    if len(weights) == 0 or bool((weights < 0).any()) or float(weights.sum()) <= 0:
        raise ValueError(f"the modes' weights must be non-negative with a positive sum, got {list(beta)}")
    if teacher_steps % len(weights):
        raise ValueError(
            f"the teacher's {teacher_steps} steps must be a multiple of the {len(weights)} modes, "
            "so that every mode is a timestep of its grid"
        )
    index = torch.arange(teacher_steps, dtype=torch.float64)
    modes = torch.arange(len(weights), dtype=torch.float64) * (teacher_steps / len(weights))
    density = (weights * torch.exp(-((index[:, None] - modes) ** 2) / twice_variance)).sum(1)
    return density / density.sum()
