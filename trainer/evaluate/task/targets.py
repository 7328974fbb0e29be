"""The targets of the demo's students on a task: set distances. Pixel figures reward blur, and judge nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....flash_core.measures.confidence_intervals import Estimate
from ..generate import SamplingSetting
from .figures import FRECHET

# By the student's steps: set distance / the teacher's own (between two sets of its own pictures), at most.
WITHIN = {4: 1.05, 2: 1.15, 1: 1.4}
CLEARLY_NEARER = (2, 1)  # steps where the student must be nearer than the undistilled teacher, beyond chance


def verdict(difference: Estimate) -> str:
    """Return ``better`` or ``worse`` where the whole interval is on one side of 0, else ``even``."""
    if difference.low is None or difference.high is None:
        return "even"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "even"


def targets_of(
    estimates: Mapping[str, Mapping[str, Estimate]], comparisons: Sequence[Mapping[str, Any]], many: str
) -> list[dict[str, Any]]:
    """Return the student's targets; none where distances of sets were not measured.

    - ``within``: Fréchet distance / the teacher's own is at most ``WITHIN``. ``value`` is this ratio.
    - ``better``: the student is nearer than the undistilled teacher in as many steps: the 95 % interval of the
      difference on the same samples is above 0. ``value`` is this difference.

    Args:
        estimates: of each run its figures.
        comparisons: of student's runs with their rivals.
        many: name of the teacher's many steps, whose distance is the teacher's own.
    """
    key = FRECHET.key
    if key not in estimates[many]:
        return []
    found: list[dict[str, Any]] = []
    theirs = estimates[many][key].value
    assert theirs is not None
    for steps, limit in WITHIN.items():
        student = SamplingSetting("student", steps).name
        ours = estimates[student][key].value
        assert ours is not None
        line = {"figure": key, "kind": "within", "run": student, "rival": many, "value": ours / theirs}
        found.append({**line, "at_most": limit, "met": ours <= limit * theirs})
    for steps in CLEARLY_NEARER:
        names = SamplingSetting("student", steps).name, SamplingSetting("teacher", steps).name
        against = next(line for line in comparisons if (line["run"], line["rival"], line["figure"]) == (*names, key))
        found.append({**against, "kind": "better", "met": against["verdict"] == "better"})
    return found
