"""The skeleton of every evaluation: list the runs, measure each run, hold the student to targets, write the report."""

from __future__ import annotations

import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from ..files import write_whole
from .progress import progress_bar

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from torch import Tensor

AnyRun = TypeVar("AnyRun")
Record = dict[str, Any]  # one run's line in report.json


class SeesPictures(Protocol):
    """A feature network: embeds and classifies pictures for the metrics."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (B, D) and class scores (B, C) of images (B, 3, H, W) in [0, 1]."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, in the order of the scores: "red heart", "blue heart"."""
        ...

    @property
    def general(self) -> Sequence[str]:
        """A general caption of each class: "heart"."""
        ...

    @property
    def title(self) -> str:
        """The network in a few words: "the demo's feature network"."""
        ...


class Evaluator(ABC, Generic[AnyRun]):
    """One evaluation: :meth:`evaluate` measures every run and writes ``report.json``.

    Class attributes:
        kind: of the report; ``flash-diffusion report`` picks the page's texts by the kind.

    Attributes:
        output: folder of the report.
        student: the student's title; None = no student.
        progress: counts the passes while :meth:`evaluate` runs.
    """

    kind: ClassVar[str]
    progress: Progress

    def __init__(self, output: Path, student: str | None) -> None:
        self.output = output
        self.student = student

    @abstractmethod
    def runs(self) -> Sequence[AnyRun]:
        """Return the runs in the report's order."""

    @abstractmethod
    def measure(self, run: AnyRun) -> Record:
        """Measure one run."""

    @abstractmethod
    def facts(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the other entries of the report: settings, environment, pictures and the evaluation's own."""

    def prepare(self) -> None:
        """Do the work that comes before the first run is measured."""

    def targets(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Return the student's targets: the value, the limit, and whether the target is ``met``."""
        return []

    def notes(self, records: Sequence[Record]) -> list[str]:
        """Return sentences that a reader of the report must know, such as a measure that was left out and why."""
        return []

    def evaluate(self, console: Console | None = None) -> dict[str, Any]:
        """Measure everything, write ``report.json`` and the pictures into ``output``, and return the report.

        Args:
            console: shows the progress; None shows nothing.
        """
        with progress_bar(console) as self.progress:
            self.prepare()
            records = [self.measure(run) for run in self.runs()]
            report = {
                "kind": self.kind,
                "student": self.student,
                "runs": records,
                "targets": self.targets(records) if self.student is not None else [],
                "notes": self.notes(records),
                **self.facts(records),
            }
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_whole(self.output / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
        return report

    def expect(self, bar: TaskID, passes: int) -> None:
        """Add work to a progress bar."""
        self.progress.update(bar, total=(self.progress.tasks[bar].total or 0) + passes)


def environment(device: torch.device | str) -> dict[str, Any]:
    """Return the versions and the device that the seconds were measured on."""
    import torch

    from ... import __version__

    return {
        "flash_diffusion": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def folder_name(run: str) -> str:
    """Return the name of a run's folder: ``teacher 4 steps, guided`` -> ``teacher-4-steps-guided``."""
    return run.replace(",", "").replace(" ", "-")


def save_pictures(pictures: Iterable[Tensor], output: Path, name: str) -> list[str]:
    """Write pictures (3, H, W) in [0, 1] as lossless WebP; return their paths inside ``output``."""
    from ..pictures import picture_from_unit

    names = []
    for index, picture in enumerate(pictures):
        names.append(f"pictures/{folder_name(name)}/{index:02}.webp")
        write_whole(output / names[-1], partial(picture_from_unit(picture).save, format="WEBP", lossless=True))
    return names
