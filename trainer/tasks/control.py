"""Control: a picture made along a hint, with a ControlNet or T2I-adapter (``model.control``) that reads it.

Of the training pictures alone, hints are their Canny edges, by the function behind ComfyUI's own Canny node, so that
hints in use are hints in training. Poses, depth and the like come as pictures beside the training pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from kornia.filters import canny
from pydantic import Field, model_validator
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ..config import Section
from .base import Task
from .figures import Figure, Scene
from .scores import edge_agreement

if TYPE_CHECKING:
    from ..teachers.base import Teacher

Threshold = Annotated[float, Field(gt=0)]


class ControlOptions(Section):
    """The thresholds of Canny edges. Defaults: ComfyUI's Canny node's."""

    low_threshold: tuple[Threshold, Threshold] = Field(
        (0.4, 0.4),
        description="low and high of the random threshold: pixels next to an edge with a gradient above join the edge",
    )
    high_threshold: tuple[Threshold, Threshold] = Field(
        (0.8, 0.8), description="low and high of the random threshold: a pixel with a gradient above is an edge"
    )

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> ControlOptions:
        for name in ("low_threshold", "high_threshold"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be [low, high] with low <= high, not {[low, high]}")
        if self.low_threshold[1] > self.high_threshold[0]:
            raise ValueError("low_threshold must not be above high_threshold")
        return self


class Control(Task):
    """Text with a hint (edges, poses, depth). Both branches see the hint, so guidance strengthens the text."""

    name = "control"
    options_class: ClassVar[type[Section]] = ControlOptions
    options: ControlOptions
    companions = ("hint",)
    gives_hint = True
    figures = (
        Figure(
            "f1",
            "Edge agreement",
            "edges F1",
            "F1 of the result’s edges against the hint’s, found by the same detector, with a tolerance of 2 pixels: 1 "
            "= all of the hint’s edges and no others. The run without the hint shows how much agreement is chance.",
            higher_is_better=True,
        ),
        Figure(
            "precision",
            "Precision of the edges",
            "precision",
            "Share of the result’s edges that are edges of the hint.",
            higher_is_better=True,
        ),
        Figure(
            "recall",
            "Recall of the edges",
            "recall",
            "Share of the hint’s edges that are edges of the result.",
            higher_is_better=True,
        ),
    )
    without = "without the hint"

    def extra_channels(self, latent_channels: int) -> int:
        """Return 0: a network beside the UNet reads the hint."""
        return 0

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``hint`` (B, 3, H, W) in [0, 1]: the companion of that name, else the picture's edges."""
        if "hint" in companions:
            return {"hint": (companions["hint"] + 1) / 2}
        low, high = (
            [smallest + (largest - smallest) * share for share in torch.rand(len(images), generator=generator).tolist()]
            for smallest, largest in (self.options.low_threshold, self.options.high_threshold)
        )
        return {
            "hint": torch.cat(
                [canny_edges(image[None], *thresholds) for image, *thresholds in zip(images, low, high, strict=True)]
            )
        }

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """Return the hint unchanged."""
        return Conditioning(hint=drawn["hint"])

    def draw_for_evaluation(
        self, images: Tensor, others: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return ``hint``, and ``edges`` if the hint was drawn here, so that edges can be compared."""
        drawn = self.draw(images, companions, generator)
        return drawn if "hint" in companions else {**drawn, "edges": drawn["hint"][:, :1]}

    def scores(self, made: Tensor, scene: Scene) -> dict[str, Tensor]:
        """Return the agreement of the edges; NaN for companion hints, which may be depth or poses."""
        if "edges" not in scene.drawn:
            return {figure.key: torch.full((len(made),), torch.nan) for figure in self.figures}
        low, high = (sum(limits) / 2 for limits in (self.options.low_threshold, self.options.high_threshold))
        return edge_agreement(canny_edges(made * 2 - 1, low, high)[:, :1], scene.drawn["edges"])

    def shown(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the hint."""
        return {"hint": drawn["hint"]}

    def conditions_without(self, conditioning: Conditioning) -> Conditioning | None:
        """Return the text alone."""
        return replace(conditioning, hint=None)


def canny_edges(images: Tensor, low_threshold: float = 0.4, high_threshold: float = 0.8) -> Tensor:
    """Return Canny edges (B, 3, H, W), 0 or 1, of images (B, 3, H, W) in [-1, 1].

    Args:
        low_threshold, high_threshold: as ComfyUI's Canny node has them, of pictures in [0, 1].
    """
    # One by one: weak edges are followed from strong ones until the longest of a batch has been.
    scale = 1.0
    while high_threshold * scale >= 1:  # kornia before 0.9, the newest for Python 3.10, accepts only thresholds below 1
        scale /= 2
    thresholds = low_threshold * scale, high_threshold * scale
    found = [canny(scale * (image[None].float() + 1) / 2, *thresholds)[1] for image in images]
    return torch.cat(found).repeat(1, 3, 1, 1)
