"""Timestep grids: the trailing grid, where training puts its weight on it, and ``denoise`` snapped to it.

A grid is a list of timesteps from noise to image. Index ``k = 0`` is pure noise; the step after the last lands on z0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .process import NUM_TIMESTEPS, FlowProcess, Process, VPProcess

# Four modes at t = 999, 749, 499, 249 and a narrow bell around each (arXiv 2406.02347, section 4.1).
NUM_MODES = 4
MIXTURE_TWICE_VARIANCE = 0.5

MAX_FEW_STEPS = 8

LCM_TIMESTEPS = 50  # original_inference_steps of diffusers' LCMScheduler


def trailing_fractions(steps: int) -> list[float]:
    """``1, (N-1)/N, ..., 1/N``: the trailing spacing of ``steps`` evaluations, as fractions of the schedule."""
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}")
    return [(steps - index) / steps for index in range(steps)]


def trailing_timesteps(process: Process, steps: int) -> list[float]:
    """The trailing grid of a process: 999, 749, 499, 249 for four steps of a variance-preserving one."""
    return [process.timestep(fraction) for fraction in trailing_fractions(steps)]


def fraction_of(process: VPProcess | FlowProcess, timestep: float) -> float:
    """The fraction of the trailing schedule at which ``timestep`` lies: the inverse of ``process.timestep``."""
    if isinstance(process, FlowProcess):
        sigma = timestep / NUM_TIMESTEPS
        return sigma / (process.shift - (process.shift - 1) * sigma)
    return (timestep + 1) / process.num_timesteps


def nearest(fractions: Sequence[float], wanted: float) -> float:
    """The fraction nearest to ``wanted``; of two equally near ones the lower, which changes less of a picture."""
    return min(fractions, key=lambda fraction: (round(abs(fraction - wanted), 9), fraction))


def snap_denoise(grid: Sequence[float], denoise: float, modes: Sequence[float] = ()) -> list[float]:
    """The fractions of the schedule that a few-step model evaluates for image-to-image.

    ``denoise`` in (0, 1] is snapped to the nearest fraction the model was trained at: those of ``grid``, a full run,
    and ``modes``. Of the evaluations of a full run about ``len(grid) * denoise`` remain (at least one), each at a
    trained fraction.
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

    4 steps at denoise .5 evaluate t = 499 and 249, not four timesteps that the model has never seen.
    """
    return snap_denoise(trailing_fractions(steps), denoise, trailing_fractions(NUM_MODES))


def snapped_timesteps(
    process: VPProcess | FlowProcess,
    steps: int,
    denoise: float = 1.0,
    trained: Mapping[int, Sequence[float]] | None = None,
) -> list[float]:
    """The trained timesteps of a run: :func:`snapped_fractions` at the timesteps of ``process``.

    Args:
        process: names the timestep at a fraction.
        steps: evaluations of a full run.
        denoise: in (0, 1]; below 1 the run starts at the nearest trained timestep.
        trained: by step count, the timesteps that a LoRA says it was trained on. A step count that it lists is taken
            from there; one that it does not list is trailing.
    """
    trained = trained or {}
    if steps not in trained:
        return [process.timestep(fraction) for fraction in snapped_fractions(steps, denoise)]
    full = {fraction_of(process, t): t for t in trained[steps]}
    modes = trained.get(NUM_MODES) or trailing_timesteps(process, NUM_MODES)
    timesteps = {fraction_of(process, t): t for t in modes} | full
    return [float(timesteps[fraction]) for fraction in snap_denoise(list(full), denoise, list(timesteps))]


def reference_timesteps(
    process: VPProcess | FlowProcess, steps: int, denoise: float = 1.0, *, dynamic_shift: bool = False
) -> list[float]:
    """The timesteps of diffusers' few-step schedulers where nobody names any, as in the published pipelines.

    Variance-preserving: ``LCMScheduler``, evenly from a table of 50 timesteps: 999, 759, 499, 259. Flow:
    ``FlowMatchEulerDiscreteScheduler``, evenly between its noise levels, which are shifted already and are shifted
    again: 1000, 858, 602, 9 with shift 3. Pipelines whose shift follows the picture's size (Flux: ``dynamic_shift``)
    hand it trailing levels. ``denoise`` below 1 keeps the last ``steps * denoise`` of the timesteps, rounded down but
    at least one, as diffusers' image-to-image pipelines do.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}")
    if isinstance(process, FlowProcess) and dynamic_shift:
        timesteps = trailing_timesteps(process, steps)
    elif isinstance(process, FlowProcess):
        last = process.timestep(1 / NUM_TIMESTEPS) / NUM_TIMESTEPS
        evenly = [1 - (1 - last) * index / max(steps - 1, 1) for index in range(steps)]
        timesteps = [process.timestep(fraction) for fraction in evenly]
    else:
        if not 1 <= steps <= LCM_TIMESTEPS:
            raise ValueError(f"the reference grid has 1 to {LCM_TIMESTEPS} steps, got {steps}")
        spacing = process.num_timesteps // LCM_TIMESTEPS
        table = [float(spacing * index - 1) for index in range(LCM_TIMESTEPS, 0, -1)]
        timesteps = [table[LCM_TIMESTEPS * index // steps] for index in range(steps)]
    return timesteps[-max(1, int(steps * denoise)) :]


def is_timestep(process: VPProcess | FlowProcess, timestep: float) -> bool:
    """Whether a network of this process can be asked at ``timestep`` and there is noise to remove there."""
    if isinstance(process, FlowProcess):
        return 0 < timestep <= NUM_TIMESTEPS
    return timestep in range(process.num_timesteps)


def describe_timesteps(process: VPProcess | FlowProcess) -> str:
    """What :func:`is_timestep` accepts, in words."""
    if isinstance(process, FlowProcess):
        return f"numbers above 0 and up to {NUM_TIMESTEPS} (the noise level times {NUM_TIMESTEPS})"
    return f"whole numbers of 0 to {process.num_timesteps - 1}"


def custom_timesteps(process: VPProcess | FlowProcess, text: str, denoise: float = 1.0) -> list[float]:
    """The timesteps that a user lists: ``"999, 749, 499, 249"``.

    ``denoise`` below 1 starts at the listed timestep nearest to that fraction of the schedule and goes on to the end
    of the list.

    Raises:
        ValueError: the list is empty, holds something that is no timestep of this process, or does not descend.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise must be above 0 and at most 1, got {denoise}")
    expected = describe_timesteps(process)
    if not text.strip():
        raise ValueError(f"The custom grid needs timesteps, and none are given. Write {expected}, separated by commas.")
    timesteps = []
    for part in text.split(","):
        try:
            timestep = float(part)
        except ValueError:
            timestep = math.nan
        if not is_timestep(process, timestep):
            raise ValueError(
                f"The custom timesteps are {text!r}, of which {part.strip()!r} is no timestep of this model. "
                f"Write {expected}, from noise to image and separated by commas."
            )
        timesteps.append(timestep)
    for before, after in pairwise(timesteps):
        if after >= before:
            raise ValueError(
                f"The custom timesteps must descend, from noise to image; in {text!r}, {after:g} comes after "
                f"{before:g}. Write {expected}."
            )
    fractions = [fraction_of(process, timestep) for timestep in timesteps]
    return timesteps if denoise == 1 else timesteps[fractions.index(nearest(fractions, denoise)) :]


def implied_shift(trained: Mapping[int, Sequence[float]]) -> float | None:
    """The shift with which trailing grids of a flow process are these timesteps, by step count; None for no shift."""
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
