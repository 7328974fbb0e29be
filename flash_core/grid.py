"""Timestep grids: the trailing grid, the training distribution over it, and ``denoise`` snapped to it.

A grid is a list of timesteps from noise to image. Index ``k = 0`` is pure noise; the last step ends at z0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .process import NUM_TIMESTEPS, FlowProcess, Process

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


def nearest(fractions: Sequence[float], wanted: float) -> float:
    """The fraction nearest to ``wanted``; of two equally near ones the lower, which changes less of a picture."""
    return min(fractions, key=lambda fraction: (round(abs(fraction - wanted), 9), fraction))


def snap_denoise(grid: Sequence[float], denoise: float, modes: Sequence[float] = ()) -> list[float]:
    """The fractions of the schedule that a few-step model evaluates for image-to-image.

    ``denoise`` in (0, 1] is snapped to the nearest trained fraction. Trained fractions are those of ``grid`` (a full
    run) and of ``modes``. About ``len(grid) * denoise`` evaluations remain (at least one), each at a trained fraction.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}")
    trained = sorted({*grid, *modes})
    start = nearest(trained, denoise)
    if denoise == 1 or start >= max(grid):
        return list(grid)
    count = max(1, math.floor(len(grid) * start + 0.5))
    allowed = [fraction for fraction in trained if fraction <= start]
    wanted = [start * (count - index) / count for index in range(count)]
    return sorted({nearest(allowed, value) for value in wanted}, reverse=True)


def snapped_fractions(steps: int, denoise: float) -> list[float]:
    """:func:`snap_denoise` on the trailing grid and the four modes.

    4 steps at denoise .5 evaluate t = 499 and 249, and no timestep that the model was not trained at.
    """
    return snap_denoise(trailing_fractions(steps), denoise, trailing_fractions(NUM_MODES))


def snapped_timesteps(
    process: Process,
    steps: int,
    denoise: float = 1.0,
    trained: Mapping[int, Sequence[float]] | None = None,
) -> list[float]:
    """The trained timesteps of a run: :func:`snapped_fractions` at the timesteps of ``process``.

    Args:
        process: the noise process.
        steps: evaluations of a full run.
        denoise: in (0, 1]; below 1 the run starts at the nearest trained timestep. Default: 1.
        trained: {step count: timesteps} from a LoRA's metadata. A step count that is not in it gets the trailing grid.
            Default: the trailing grid for every step count.
    """
    trained = trained or {}
    if steps not in trained:
        return [process.timestep(fraction) for fraction in snapped_fractions(steps, denoise)]
    full = {process.fraction(t): t for t in trained[steps]}
    modes = trained.get(NUM_MODES) or trailing_timesteps(process, NUM_MODES)
    timesteps = {process.fraction(t): t for t in modes} | full
    return [float(timesteps[fraction]) for fraction in snap_denoise(list(full), denoise, list(timesteps))]


def reference_timesteps(
    process: Process, steps: int, denoise: float = 1.0, *, dynamic_shift: bool = False
) -> list[float]:
    """The timesteps of diffusers' published few-step pipelines: :meth:`~.process.Process.reference_timesteps`.

    Args:
        process: the noise process.
        steps: evaluations of a full run.
        denoise: in (0, 1]. Below 1 the last ``int(steps * denoise)`` timesteps remain (at least one), as in diffusers'
            image-to-image pipelines. Default: 1.
        dynamic_shift: True for a flow pipeline whose shift depends on the picture's size (Flux); such a pipeline
            evaluates the trailing grid. Default: False.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}")
    timesteps = trailing_timesteps(process, steps) if dynamic_shift else process.reference_timesteps(steps)
    return timesteps[-max(1, int(steps * denoise)) :]


def custom_timesteps(process: Process, text: str, denoise: float = 1.0) -> list[float]:
    """Read a user's list of timesteps: ``"999, 749, 499, 249"``.

    With ``denoise`` below 1 the run starts at the listed timestep that is nearest to this fraction of the schedule.

    Raises:
        ValueError: the list is empty, an entry is no timestep of this process, or the list does not descend.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}")
    expected = process.timesteps_in_words
    if not text.strip():
        raise ValueError(f"The list of custom timesteps is empty. Write {expected}, separated by commas.")
    timesteps = []
    for part in text.split(","):
        try:
            timestep = float(part)
        except ValueError:
            timestep = math.nan
        if not process.is_timestep(timestep):
            raise ValueError(
                f"The custom timesteps are {text!r}, but {part.strip()!r} is no timestep of this model. "
                f"Write {expected}, from noise to image, separated by commas."
            )
        timesteps.append(timestep)
    for before, after in pairwise(timesteps):
        if after >= before:
            raise ValueError(
                f"The custom timesteps must descend, from noise to image. In {text!r}, {after:g} comes after "
                f"{before:g}. Write {expected}."
            )
    fractions = [process.fraction(timestep) for timestep in timesteps]
    return timesteps if denoise == 1 else timesteps[fractions.index(nearest(fractions, denoise)) :]


def implied_shift(trained: Mapping[int, Sequence[float]]) -> float | None:
    """Return the shift of the flow process whose trailing grids are ``trained``, or None if there is no such shift.

    Args:
        trained: {step count: timesteps}.
    """
    for steps, timesteps in trained.items():
        for fraction, timestep in zip(trailing_fractions(steps), timesteps, strict=False):
            sigma = timestep / NUM_TIMESTEPS
            if fraction < 1 and 0 < sigma < 1:
                process = FlowProcess(sigma * (1 - fraction) / (fraction * (1 - sigma)))
                fits = all(
                    len(grid) == count
                    and all(abs(a - b) < 1 for a, b in zip(grid, trailing_timesteps(process, count), strict=True))
                    for count, grid in trained.items()
                )
                return process.shift if fits else None
    return None


def timestep_mixture(
    teacher_steps: int, beta: Sequence[float], twice_variance: float = MIXTURE_TWICE_VARIANCE
) -> Tensor:
    """The training distribution ``pi(k)`` over the K indices of the teacher's grid, (K,) float64, summing to 1.

    ``pi(k) ~ sum_i beta_i exp(-(k - mu_i)^2 / twice_variance)`` with ``mu_i = i K / len(beta)``
    (arXiv 2406.02347, section 4.1).

    Args:
        teacher_steps: K, a multiple of ``len(beta)``, so that the modes lie on the grid.
        beta: the weight of each mode, from pure noise on; none is negative, and not all are 0.
        twice_variance: of each mode. Default: 0.5.
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
