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

    def features(self) -> dict[str, Tensor]:
        """Return the features of all pictures (N, D) by their kind."""
        return {kind: torch.cat(parts) for kind, parts in self.kinds.items()}
