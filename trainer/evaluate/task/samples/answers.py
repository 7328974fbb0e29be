"""What is kept of a comparison on a task: features and scores of each run, and the pictures that the report shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...evaluator import save_pictures

if TYPE_CHECKING:
    from ....tasks.base import Task
    from ....tasks.figures import Scene
    from .subjects import Batch


@dataclass
class Answers:
    """The answers of one run to the samples of a comparison on a task.

    Attributes:
        kinds: of each kind of features its batches (B, D).
        scores: of each of the task's figures its batches (B,).
        pictures: the first results (3, H, W) in [0, 1].
        seconds: that the run took.
    """

    kinds: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    scores: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    pictures: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def keep(self, kinds: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None) -> None:
        """Keep the features, and the scores, of further pictures."""
        for kind, values in kinds.items():
            self.kinds[kind].append(values)
        for key, values in (scores or {}).items():
            self.scores[key].append(values)

    def show(self, pictures: Tensor, most: int) -> None:
        """Keep pictures to show as long as there are fewer than ``most``."""
        wanted = pictures[: max(most - len(self.pictures), 0)]
        self.pictures += [picture.clone() for picture in wanted]  # a view would hold the whole batch

    def forget_features(self) -> None:
        """Free the features and scores, once they are measured."""
        self.kinds.clear()
        self.scores.clear()

    def features(self) -> dict[str, Tensor]:
        """Return the features of all pictures (N, D) by their kind."""
        return {kind: torch.cat(parts) for kind, parts in self.kinds.items()}


@dataclass
class Shown:
    """The first samples, as the report shows them: captions, conditions, originals.

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
