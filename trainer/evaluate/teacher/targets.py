"""The targets of the demo's students: the project's aims, told as met or missed.

A student as good as its teacher scores the floor, the teacher's diversity and the teacher's prompt accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..generate import SamplingSetting
from ..request import FEW_STEPS

# Times the floor: a gap that is smaller than that is chance. On the demo the ratio of two Fréchet distances of 192
# pictures has a standard deviation of 8 % over draws of the pictures.
CHANCE = 0.3


@dataclass(frozen=True)
class Limits:
    """Limits by the student's steps.

    Attributes:
        floor: Fréchet distance / floor, at most.
        diversity: diversity / the teacher's diversity, at least.
        accuracy: prompt accuracy, at least.
    """

    floor: Mapping[int, float]
    diversity: Mapping[int, float]
    accuracy: Mapping[int, float]


# Of the LoRA that ships, and of the student that ``make demo`` trains in a few minutes.
LIMITS: dict[Literal["shipped", "make-demo"], Limits] = {
    "shipped": Limits({4: 1.05, 2: 1.10, 1: 1.40}, {4: 0.92, 2: 0.90, 1: 0.88}, {4: 0.99, 2: 0.98, 1: 0.96}),
    "make-demo": Limits({4: 1.10, 2: 1.25, 1: 1.80}, {}, {}),
}


@dataclass(frozen=True)
class Gap:
    """A student beside the undistilled teacher with as many passes: Fréchet distances, and the floor."""

    steps: int
    student: float
    undistilled: float
    floor: float

    @property
    def closed(self) -> float | None:
        """(undistilled - student) / (undistilled - floor): 1 = at the floor. None where the gap is chance."""
        gap = self.undistilled - self.floor
        return (self.undistilled - self.student) / gap if gap >= CHANCE * self.floor else None

    @property
    def times_closer(self) -> float:
        """undistilled / student."""
        return self.undistilled / self.student


def gaps_of(records: Sequence[Mapping[str, Any]]) -> list[Gap]:
    """Return the gaps of the student's runs. The first record is the teacher's many steps, which score the floor."""
    fd = {line["name"]: line["fd"] for line in records}
    pairs = [(steps, SamplingSetting("student", steps), SamplingSetting("teacher", steps)) for steps in FEW_STEPS]
    return [Gap(steps, fd[student.name], fd[rival.name], records[0]["fd"]) for steps, student, rival in pairs]


def targets_of(
    records: Sequence[Mapping[str, Any]], of: Literal["shipped", "make-demo"] = "shipped"
) -> list[dict[str, Any]]:
    """Return the targets with the values that came out, the most steps first.

    - ``floor``: Fréchet distance / floor.
    - ``diversity``: diversity / the teacher's.
    - ``accuracy``: prompt accuracy.

    A target whose figure was not measured is left out.

    Args:
        records: of all runs; the first is the teacher's many steps, which score the floor.
    """
    limits, runs, teacher = LIMITS[of], {line["name"]: line for line in records}, records[0]
    found: list[dict[str, Any]] = []
    for steps, limit in limits.floor.items():
        run = SamplingSetting("student", steps).name
        value = runs[run]["fd"] / teacher["fd"]
        line = {"run": run, "kind": "floor", "measure": "times the floor", "value": value}
        found.append({**line, "at_most": limit, "met": value <= limit})
    for steps, limit in limits.diversity.items():
        run = SamplingSetting("student", steps).name
        if runs[run]["diversity"] is not None and teacher["diversity"]:
            value = runs[run]["diversity"] / teacher["diversity"]
            line = {"run": run, "kind": "diversity", "measure": "times the teacher’s diversity", "value": value}
            found.append({**line, "at_least": limit, "met": value >= limit})
    for steps, limit in limits.accuracy.items():
        run = SamplingSetting("student", steps).name
        value = runs[run]["prompt_accuracy"]
        if value is not None:
            line = {"run": run, "kind": "accuracy", "measure": "of the pictures show what their prompt names"}
            found.append({**line, "value": value, "at_least": limit, "met": value >= limit})
    return found
