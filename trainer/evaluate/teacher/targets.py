"""The targets of a comparison with the teacher, and where they mean something.

The targets are the project's, for its demo. A target says something about a student only where the undistilled teacher
misses it, and where a student as good as the teacher meets it whatever the draw of the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..generate import SamplingSetting
from ..request import FEW_STEPS

# By the student's steps: its Fréchet distance is at most so many times the floor; and it closes at least this share of
# the gap between the undistilled teacher and the floor.
FLOOR_LIMITS = {4: 1.5, 2: 3.0, 1: 6.0}
GAP_LIMITS = {4: 0.4, 2: 0.8, 1: 0.9}
# Times the floor: a target nearer to the floor than that is met or missed by chance. On the demo the ratio of two
# Fréchet distances of 192 pictures has a standard deviation of 8 % over draws of the pictures.
CHANCE = 0.3


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

    @property
    def has_floor_target(self) -> bool:
        """Whether the undistilled teacher itself misses the target of the distance."""
        return self.undistilled > FLOOR_LIMITS[self.steps] * self.floor

    @property
    def has_gap_target(self) -> bool:
        """Whether a student at the floor meets the target of the gap, whatever the draw of the noise."""
        slack = (1 - GAP_LIMITS[self.steps]) * (self.undistilled - self.floor)
        return slack >= CHANCE * self.floor * (1 - 1e-9)  # the limits are decimal fractions


def gaps_of(records: Sequence[Mapping[str, Any]]) -> list[Gap]:
    """Return the gaps of the student's runs. The first record is the teacher's many steps, which score the floor."""
    fd = {line["name"]: line["fd"] for line in records}
    pairs = [(steps, SamplingSetting("student", steps), SamplingSetting("teacher", steps)) for steps in FEW_STEPS]
    return [Gap(steps, fd[student.name], fd[rival.name], records[0]["fd"]) for steps, student, rival in pairs]


def targets_of(gaps: Sequence[Gap]) -> list[dict[str, Any]]:
    """Return the targets that mean something, with the values that came out.

    - ``floor``: the student's Fréchet distance / the floor is at most ``FLOOR_LIMITS``.
    - ``gap``: the share of the gap closed is at least ``GAP_LIMITS``.

    The floor is the Fréchet distance of two independent sets of the teacher's own, above 0.
    """
    found: list[dict[str, Any]] = []
    for gap in gaps:
        if not gap.has_floor_target:
            continue
        value, limit = gap.student / gap.floor, FLOOR_LIMITS[gap.steps]
        line = {"run": SamplingSetting("student", gap.steps).name, "kind": "floor", "measure": "times the floor"}
        found.append({**line, "value": value, "at_most": limit, "met": value <= limit})
    for gap in gaps:
        closed, limit = gap.closed, GAP_LIMITS[gap.steps]
        if closed is None or not gap.has_gap_target:
            continue
        rival = SamplingSetting("teacher", gap.steps).name
        measure = f"of the gap closed between {rival} without guidance and the floor"
        line = {"run": SamplingSetting("student", gap.steps).name, "kind": "gap", "measure": measure}
        found.append({**line, "value": closed, "at_least": limit, "met": closed >= limit})
    return found


def left_out(gaps: Sequence[Gap]) -> list[str]:
    """Return why a step count lacks a target, one sentence for each target."""
    found = []
    for gap in gaps:
        run = SamplingSetting("student", gap.steps).name.capitalize()
        lies = f"The undistilled teacher with as many passes lies at {gap.undistilled / gap.floor:.2f} x the floor"
        if not gap.has_floor_target:
            limit = FLOOR_LIMITS[gap.steps]
            found.append(f"{run}: no target for the distance. {lies}, so it meets {limit:g} x without distillation.")
        if not gap.has_gap_target:
            share = GAP_LIMITS[gap.steps]
            found.append(
                f"{run}: no target for the gap closed. {lies}. To close {share:.0%} of so small a gap, the student "
                f"would have to come nearer to the floor than {CHANCE:g} x, and there chance decides."
            )
    return found
