"""The sets of samples of a comparison on a task: each has its own seed, and what every run answers to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .answers import Answers

if TYPE_CHECKING:
    from .subjects import Subjects


@dataclass
class SampleSet:
    """One set of samples.

    Attributes:
        subjects: the pictures that the samples are drawn from.
        seed: of conditions and noise.
        reference: file of the teacher's answers; None = they are not kept.
        shown: pictures of each run to keep: for the report's page, and for the file.
        seen: {run's name: its answers}.
        independent: answers of the teacher's many steps, with the same conditions and other noise.
        is_stored: whether the teacher's answers come from ``reference``.
    """

    subjects: Subjects
    seed: int
    reference: Path | None = None
    shown: int = 0
    seen: dict[str, Answers] = field(default_factory=lambda: defaultdict(Answers))
    independent: Answers = field(default_factory=Answers)
    is_stored: bool = False

    def forget_features(self) -> None:
        """Free what the figures were measured from; the pictures to show stay."""
        for answers in (*self.seen.values(), self.independent):
            answers.forget_features()


def sample_sets(subjects: Sequence[Subjects], seed: int, reference: Path | None, shown: int) -> list[SampleSet]:
    """Return the sets of seeds ``seed``, ``seed + 1``, ...; ``subjects`` has an entry for each.

    The first set's answers are in the file ``reference``, those of another seed in a file beside it:
    ``answers.safetensors`` and ``answers.seed1.safetensors``.

    Args:
        shown: pictures of each run that the report's page shows, from the first set.
    """

    def file_of(index: int) -> Path | None:
        if reference is None or not index:
            return reference
        return reference.with_name(f"{reference.stem}.seed{seed + index}{reference.suffix}")

    return [
        SampleSet(each, seed + index, file_of(index), shown if not index or reference is not None else 0)
        for index, each in enumerate(subjects)
    ]
