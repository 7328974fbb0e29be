"""How a run changes over time: its clock, phases, learning rates and the moving average of its weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

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


class WeightAverage:
    """The exponential moving average of parameters: average <- decay * average + (1 - decay) * parameter.

    In update n the decay is min(decay, (1 + n) / (10 + n)), so that the first weights fade quickly.

    Args:
        parameters: name -> parameter, on any device.
        decay: the largest decay, in [0, 1); 0 makes the average equal to the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the parameters, as they are after ``updates`` updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters their averages inside the ``with`` block."""
        kept = {name: value.data for name, value in self.parameters.items()}
        for name, value in self.parameters.items():
            value.data = self.tensors[name]
        try:
            yield
        finally:
            for name, value in self.parameters.items():
                value.data = kept[name]


def warmup_cosine(update: int, progress: float, *, warmup: int = 0, flat: float = 0.0, final: float = 0.0) -> float:
    """Return the learning rate as a share of its full value: a linear rise, then flat, then half a cosine.

    Args:
        update: updates made before this one.
        progress: of the whole run, in 0..1.
        warmup: updates of the rise, 0 for none.
        flat: progress at which the cosine starts to fall, in [0, 1).
        final: the share at progress 1.
    """
    rise = min(1.0, (update + 1) / warmup) if warmup else 1.0
    fallen = min(1.0, max(0.0, progress - flat) / (1 - flat))
    return rise * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fallen)))


def learning_rate_factor(section: OptimizerSection, update: int, progress: float) -> float:
    """Return a recipe's learning rates as a share of their full values.

    Args:
        update: updates made before this one.
        progress: of the whole run, in 0..1.
    """
    falls = section.schedule == "cosine"
    return warmup_cosine(update, progress if falls else 0.0, warmup=section.warmup, flat=section.decay_from)
