"""The curve of a student: does its distance fall with every added step, and is it below the undistilled teacher's?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Protocol

from ...flash_core.measures.confidence_intervals import Estimate
from .generate import SamplingSetting
from .request import FEW_STEPS


class ComparesRuns(Protocol):
    """Distances of runs to the teacher, in several kinds of features."""

    def change(self, before: str, after: str, kind: str, /) -> Estimate:
        """Return the relative change of the distance from one run to another."""
        ...

    def difference(self, name: str, rival: str, kind: str, /) -> Estimate:
        """Return by how much a run's distance is below its rival's."""
        ...


def curves_of(runs: ComparesRuns, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one entry for each kind of features.

    - ``falls``: whether the distance falls with every added step.
    - ``steps``: the relative change from each step count to the next, with its interval and its ``verdict``: ``falls``
      or ``rises`` where the whole interval is on one side of 0, else ``within the noise``.
    - ``rivals``: by how much the student is nearer than the undistilled teacher with as many passes and no guidance,
      with its interval and its ``verdict``: ``nearer``, ``farther`` or ``within the noise``.

    Args:
        kinds: {kind of features: its key in ``runs``}.
    """
    return [{"kind": kind, **_curve(runs, key)} for kind, key in kinds.items()]


def _curve(runs: ComparesRuns, key: str) -> dict[str, Any]:
    steps = []
    for few, more in pairwise(sorted(FEW_STEPS)):
        change = runs.change(SamplingSetting("student", few).name, SamplingSetting("student", more).name, key)
        steps.append({"from": few, "to": more, **asdict(change), "verdict": side(change, "rises", "falls")})
    rivals = []
    for count in FEW_STEPS:
        rival = SamplingSetting("teacher", count).name
        found = runs.difference(SamplingSetting("student", count).name, rival, key)
        rivals.append({"steps": count, "rival": rival, **asdict(found), "verdict": side(found, "nearer", "farther")})
    return {"falls": all(step["value"] < 0 for step in steps), "steps": steps, "rivals": rivals}


def side(difference: Estimate, above: str, below: str) -> str:
    """Return ``above`` or ``below`` where the whole interval is on that side of 0, else ``within the noise``."""
    if difference.low is not None and difference.low > 0:
        return above
    return below if difference.high is not None and difference.high < 0 else "within the noise"
