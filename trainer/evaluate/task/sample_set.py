"""The sets of samples of a comparison on a task: each has its own seed, and what every run answers to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .answers import Answers

if TYPE_CHECKING:
    from ..task_samples import Subjects


@dataclass
class SampleSet:
    """One set of samples.

    Attributes:
        subjects: the pictures that the samples are drawn from.
        seed: of conditions and noise.
        reference: file of the teacher's answers; None = they are not kept.
        seen: {run's name: its answers}.
        independent: answers of the teacher's many steps, with the same conditions and other noise.
        is_stored: whether the teacher's answers come from ``reference``.
    """

    subjects: Subjects
    seed: int
    reference: Path | None = None
    seen: dict[str, Answers] = field(default_factory=lambda: defaultdict(Answers))
    independent: Answers = field(default_factory=Answers)
    is_stored: bool = False


def sample_sets(subjects: Sequence[Subjects], seed: int, reference: Path | None) -> list[SampleSet]:
    """Return the sets of seeds ``seed``, ``seed + 1``, ...; ``subjects`` has an entry for each.

    The first set's answers are in the file ``reference``, those of another seed in a file beside it:
    ``answers.safetensors`` and ``answers.seed1.safetensors``. So a set's file is the same with and without others.
    """

    def file_of(index: int) -> Path | None:
        if reference is None or not index:
            return reference
        return reference.with_name(f"{reference.stem}.seed{seed + index}{reference.suffix}")

    return [SampleSet(each, seed + index, file_of(index)) for index, each in enumerate(subjects)]
