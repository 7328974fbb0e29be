"""The runs of a comparison on a task: the yardsticks, the student, the undistilled teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..generate import SamplingSetting, distinct
from ..request import FEW_STEPS, GUIDED_STEPS, Options

if TYPE_CHECKING:
    from ...tasks.base import Task

YARDSTICK = "the originals"
INDEPENDENT = "the teacher's independent set"


@dataclass(frozen=True)
class Entry:
    """One run, with its line in the report.

    Attributes:
        name: in tables.
        run: the sampling setting; None = the originals after the autoencoder.
        conditioned: whether the run sees the task's conditions.
    """

    name: str
    run: SamplingSetting | None
    conditioned: bool = True

    @property
    def of_teacher(self) -> bool:
        """Whether no student changes the answers."""
        return self.run is None or self.run.role == "teacher"


def entries_of(task: Task, options: Options, student: bool) -> list[Entry]:
    """Return the runs: the yardsticks first, then the student, then the undistilled teacher.

    The undistilled teacher runs in as many steps without guidance, and in half the steps with guidance: as many passes.
    """
    many = SamplingSetting("teacher", options.steps, options.guidance, options.interval)
    runs = [many]
    if student:
        runs += [SamplingSetting("student", steps) for steps in FEW_STEPS]
    runs += [SamplingSetting("teacher", steps) for steps in FEW_STEPS]
    runs += [SamplingSetting("teacher", steps, options.guidance) for steps in GUIDED_STEPS]
    entries = [Entry(YARDSTICK, None), *(Entry(run.name, run) for run in distinct(runs))]
    if task.without:
        entries.append(Entry(f"{many.name}, {task.without}", many, conditioned=False))
    return entries
