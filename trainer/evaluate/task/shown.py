"""What the report of a comparison on a task shows of its first samples: captions, conditions, originals, results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..evaluator import save_pictures

if TYPE_CHECKING:
    from ...tasks.base import Task
    from ...tasks.figures import Scene
    from ..task_samples import Batch
    from .answers import Answers


@dataclass
class Shown:
    """The first samples.

    Attributes:
        captions: of the samples.
        drawn: pictures of their conditions (3, H, W) in [0, 1], by title.
        originals: the data's own pictures, likewise.
    """

    captions: list[str] = field(default_factory=list)
    drawn: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    originals: list[Tensor] = field(default_factory=list)

    def keep(self, task: Task, batch: Batch, scene: Scene, most: int) -> None:
        """Keep a batch's samples, as long as there are fewer than ``most``."""
        wanted = max(most - len(self.captions), 0)
        self.captions += batch.captions[:wanted]
        self.originals += list(scene.originals[:wanted])
        for title, pictures in task.shown(batch.drawn).items():
            self.drawn[title] += list(pictures[:wanted])

    def save(self, output: Path, seen: Mapping[str, Answers], names: Collection[str]) -> dict[str, Any]:
        """Write the pictures into the report's folder, with the results of the named runs; return their paths."""
        return {
            "prompts": self.captions,
            "drawn": {
                title: save_pictures(pictures, output, f"given {title}") for title, pictures in self.drawn.items()
            },
            "original": save_pictures(self.originals, output, "original"),
            "files": {name: save_pictures(seen[name].pictures, output, name) for name in names},
        }
