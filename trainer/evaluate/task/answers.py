"""What is kept of the pictures of one run: features, scores, and the first pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
