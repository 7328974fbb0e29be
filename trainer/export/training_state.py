"""Where a run is: saved in its checkpoints, told in its model card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainingState:
    """Where a run is.

    Attributes:
        update: optimiser updates done.
        position: samples drawn from the data's order by all processes together.
        elapsed: seconds of wall time over all sessions of the run.
        training_since: ``elapsed`` when the updates began, after the trajectories.
        teacher_hash: identifies the base's weights.
    """

    update: int = 0
    position: int = 0
    elapsed: float = 0.0
    training_since: float = 0.0
    teacher_hash: str = ""
