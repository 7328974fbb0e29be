"""Estimate the time left of a run: recording and every phase, each at its measured cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Recipe
from .passes import trajectory_passes, update_passes


@dataclass
class Stage:
    """A part of a run whose units cost about the same.

    Attributes:
        units: trajectories to record, or updates to make.
        passes: expected forward passes of a unit.
        done: units done, in all sessions.
        measured: units done in this session.
        seconds: the time of the measured units.
    """

    units: int
    passes: float
    done: int = 0
    measured: int = 0
    seconds: float = 0.0


class TimeLeft:
    """Estimates the time left of a run whose stages follow each other.

    A stage costs what its units were measured to cost. A stage that has not begun costs its passes times the measured
    seconds of a pass.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)

    def advance(self, units: int, seconds: float | None) -> None:
        """Count ``units`` as done.

        Args:
            units: they may reach into the next stages.
            seconds: the time they took, None where the work of an earlier session was read.
        """
        parts: list[tuple[Stage, int]] = []
        for stage in self.stages:
            part = min(units, stage.units - stage.done)
            stage.done += part
            units -= part
            if part:
                parts.append((stage, part))
        if seconds is None:
            return
        passes = sum(stage.passes * part for stage, part in parts)
        for stage, part in parts:
            stage.measured += part
            stage.seconds += seconds * stage.passes * part / passes

    def seconds(self, limit: float | None = None) -> float | None:
        """Return the seconds left, None before anything is measured.

        Args:
            limit: the most seconds that the run may still take.
        """
        if self._seconds_of_a_pass() is None:
            return limit
        left = sum((stage.units - stage.done) * self._cost(stage) for stage in self.stages)
        return left if limit is None else min(left, limit)

    def share(self, limit: float | None = None) -> float:
        """Return the finished share of the run, in 0..1."""
        left = self.seconds(limit)
        spent = sum(stage.done * self._cost(stage) for stage in self.stages)
        return 0.0 if left is None or not spent else spent / (spent + left)

    def _seconds_of_a_pass(self) -> float | None:
        passes = sum(stage.measured * stage.passes for stage in self.stages)
        return sum(stage.seconds for stage in self.stages) / passes if passes else None

    def _cost(self, stage: Stage) -> float:
        """Return the seconds of one unit, 0 before anything is measured."""
        if stage.measured:
            return stage.seconds / stage.measured
        return stage.passes * (self._seconds_of_a_pass() or 0.0)


def recording_stage(recipe: Recipe, trajectories: int) -> Stage:
    """Return the stage that records ``trajectories`` before training."""
    return Stage(trajectories, trajectory_passes(recipe.method))


def phase_stages(recipe: Recipe, updates: int) -> list[Stage]:
    """Return one stage for each phase, after ``updates`` updates."""
    stages = [Stage(phase.updates, sum(update_passes(recipe, phase).values())) for phase in recipe.phases]
    TimeLeft(stages).advance(updates, None)
    return stages
