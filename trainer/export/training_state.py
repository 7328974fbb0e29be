"""The progress of a run, for checkpoints and the model card."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainingState:
    """The progress of a run.

    Attributes:
        update: finished optimiser updates.
        position: samples drawn from the data by all processes.
        elapsed: seconds of wall time over all sessions of the run.
        training_since: ``elapsed`` at the first update, after the trajectories.
        teacher_hash: SHA-256 of the base's weights.
        data_fingerprint: of the pictures, captions and conditions, empty where unknown.
        processes: that trained together at the last update, 0 where unknown.
        samples: of a batch, in all processes together; 0 where each process drew random numbers of its own.
        warmed_up: part (discriminator, critic) -> updates that it made alone.
    """

    update: int = 0
    position: int = 0
    elapsed: float = 0.0
    training_since: float = 0.0
    teacher_hash: str = ""
    data_fingerprint: str = ""
    processes: int = 0
    samples: int = 0
    warmed_up: dict[str, int] = field(default_factory=dict)
