"""The measures of a task in evaluations, and their references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """A measure of a task's result.

    Attributes:
        key: the name in ``report.json``.
        title, short: the heading on the page, and of a narrow column.
        meaning: the explanation, a sentence.
        higher_is_better: True if larger values are better.
        unit: ``dB`` or empty.
    """

    key: str
    title: str
    short: str
    meaning: str
    higher_is_better: bool
    unit: str = ""


@dataclass(frozen=True)
class Scene:
    """The references of B samples' measures, on the CPU.

    Attributes:
        originals: (B, 3, H, W) in [0, 1].
        others: (B, 3, H, W) in [0, 1], another picture for each sample.
        drawn: the task's drawn pictures, see ``Task.draw``.
        look: pictures (B, 3, H, W) in [0, 1] to embeddings (B, D) of the feature network.
        perceptual: LPIPS (B,) of two sets of pictures (B, 3, H, W) in [0, 1]; None without LPIPS' weights.
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
    "Perceptual distance between the result and the original (arXiv 1801.03924).",
    higher_is_better=False,
)
