"""How a run changes over time: its clock, phases and learning rates."""

from __future__ import annotations

import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ...flash_core.runs.schedule import warmup_cosine
from ..config import OptimizerSection, PhaseSection, Recipe
from ..export.training_state import TrainingState

RECORDING_SHARE = 0.6  # of a limited run's time after loading: the most that recording trajectories may take
now = time.monotonic


class RunClock:
    """The wall time of a run over all its sessions, and how far its updates are.

    Args:
        state: of the run; ``elapsed`` holds the seconds of earlier sessions.
        accelerator: its processes must agree about the last update.
    """

    def __init__(self, recipe: Recipe, state: TrainingState, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.state = state
        self.accelerator = accelerator
        self._before = state.elapsed
        self._start = now()

    @property
    def elapsed(self) -> float:
        """Seconds over all sessions."""
        return self._before + now() - self._start

    @property
    def seconds_left(self) -> float | None:
        """Seconds until ``limits.max_minutes``, None without a limit."""
        minutes = self.recipe.limits.max_minutes
        return None if minutes is None else max(0.0, 60 * minutes - self.elapsed)

    def progress(self) -> float:
        """Return how far the updates are, in 0..1: by their number, or by the clock where the clock is ahead."""
        done = self.state.update / self.recipe.updates
        minutes = self.recipe.limits.max_minutes
        if minutes is None:
            return done
        budget = max(60 * minutes - self.state.training_since, 1e-9)
        done = max(done, (self.elapsed - self.state.training_since) / budget)
        if self.accelerator.num_processes > 1:
            # One clock for all: processes that disagree about the last update would wait for each other forever.
            done = float(broadcast(torch.tensor(done, dtype=torch.float64, device=self.accelerator.device)))
        return done

    def recording_minutes(self) -> float | None:
        """Return how many minutes recording may take: the recipe's, and a share of a limited run's time left."""
        given, left = self.recipe.trajectories.max_minutes, self.seconds_left
        if left is None:
            return given
        share = left / 60 * RECORDING_SHARE
        return share if given is None else min(given, share)


def phase_at(recipe: Recipe, progress: float) -> PhaseSection:
    """Return the phase at ``progress`` of the updates, in [0, 1)."""
    left = math.floor(progress * recipe.updates + 1e-6)  # update / updates * updates may fall just below update
    for phase in recipe.phases:
        if left < phase.updates:
            return phase
        left -= phase.updates
    return recipe.phases[-1]


def learning_rate_factor(section: OptimizerSection, update: int, progress: float) -> float:
    """Return a recipe's learning rates as a share of their full values.

    Args:
        update: updates made before this one.
        progress: of the whole run, in 0..1.
    """
    falls = section.schedule == "cosine"
    return warmup_cosine(update, progress if falls else 0.0, warmup=section.warmup, flat=section.decay_from)
