"""What evaluations measure of a task: its figures, and what a picture is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """A number that says how well a task is done.

    Attributes:
        key: in ``report.json``.
        title, short: in the page, and above a narrow column.
        meaning: what it says, in a sentence.
        higher_is_better: else lower is.
        unit: ``dB``, or nothing.
        judged: whether a student is held to it; others are there to read it by.
    """

    key: str
    title: str
    short: str
    meaning: str
    higher_is_better: bool
    unit: str = ""
    judged: bool = True


@dataclass(frozen=True)
class Scene:
    """What B samples are measured against; everything on the CPU.

    Attributes:
        originals: (B, 3, H, W) in [0, 1].
        others: (B, 3, H, W) in [0, 1], for each sample another picture than its own.
        drawn: what the task drew of them, see ``Task.draw``.
        look: pictures (B, 3, H, W) in [0, 1] to embeddings (B, D) of the feature network.
        perceptual: LPIPS of two sets of pictures (B, 3, H, W) in [0, 1], (B,); None where its weights are not at hand.
    """

    originals: Tensor
    others: Tensor
    drawn: Mapping[str, Tensor]
    look: Callable[[Tensor], Tensor]
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None


PERCEPTUAL = Figure(
    "lpips",
    "LPIPS to the original",
    "LPIPS",
    "Perceptual distance from the original (arXiv 1801.03924).",
    higher_is_better=False,
)
