"""The base class of tasks: a task makes conditions of a picture.

:meth:`Task.draw` makes the pictures that a sample is conditioned on (a mask, a small picture, edges), from companions
of the training picture or at random. :meth:`Task.encode` makes the network's inputs from them. Evaluations keep the
drawn pictures, to show them and to measure against them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...flash_core.denoiser import Conditioning, unconditional_branch
from ..config import Section
from ..teachers.base import full_precision
from .figures import Figure, Scene

if TYPE_CHECKING:
    from ..teachers.base import Teacher


class NoOptions(Section):
    """The options of a task without options."""


class Task(ABC):
    """A kind of conditional generation.

    Class attributes:
        name: the task's name in recipes and in LoRA metadata.
        options_class: the class of ``task.options`` in a recipe.
        companions: names of the pictures that may lie beside a training picture, such as a mask; the task draws the
            missing ones.
        dropped: the parts of the conditions that are zeros in the unconditional branch.
        has_conditions: False if the task adds nothing to the captions.
        reads_text: True if the task uses captions; else every caption is empty.
        gives_hint: True if the conditions are a hint for a ControlNet or T2I-adapter (``model.control``).
        figures: the measures of each picture in an evaluation, see :meth:`scores`.
        demo_captions: the demo's captions of the evaluation; empty for all captions.
        without: the name of :meth:`conditions_without` in reports: "without the hint".
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Section]] = NoOptions
    companions: ClassVar[tuple[str, ...]] = ()
    dropped: ClassVar[tuple[str, ...]] = ()
    has_conditions: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True
    gives_hint: ClassVar[bool] = False
    figures: ClassVar[tuple[Figure, ...]] = ()
    demo_captions: ClassVar[tuple[str, ...]] = ()
    without: ClassVar[str] = ""

    def __init__(self, options: Section) -> None:
        self.options = options

    @abstractmethod
    def extra_channels(self, latent_channels: int) -> int:
        """Return the number of channels that the network reads beside the noisy latent's C."""

    @property
    def gives_image_tokens(self) -> bool:
        """Return True if the conditions are a picture's tokens for an IP-Adapter (``model.image_adapter``)."""
        return False

    @abstractmethod
    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the pictures that B samples are conditioned on, by name, each with B rows.

        Args:
            images: (B, 3, H, W) in [-1, 1], on the teacher's device.
            companions: pictures that lie beside the images, by name: (B, 3, H, W) in [-1, 1]; ``mask`` is
                (B, 1, H, W) in 0..1.
            generator: on the CPU; the only source of randomness.
        """

    @abstractmethod
    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """Return the conditions that the network reads, from the pictures of :meth:`draw`.

        Args:
            teacher: encodes pictures.
        """

    def conditions(
        self,
        images: Tensor,
        teacher: Teacher,
        generator: torch.Generator,
        companions: Mapping[str, Tensor] | None = None,
    ) -> Conditioning:
        """Draw and encode the task's own conditions of a batch, in full precision even under autocast.

        In low precision edges are lost and colours are rounded, unlike the pictures that users give a model.
        """
        with full_precision(images.device):
            return self.encode(self.draw(images, companions or {}, generator), teacher)

    def unconditional(self, conditioning: Conditioning, empty: Conditioning) -> Conditioning:
        """Return the unconditional branch's conditions; see :func:`~...flash_core.denoiser.unconditional_branch`."""
        return unconditional_branch(conditioning, empty, self.dropped)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def draw_for_evaluation(
        self, images: Tensor, others: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw the pictures of an evaluation, like :meth:`draw`.

        Args:
            others: (B, 3, H, W) in [-1, 1], another picture for each sample, for tasks that combine two pictures.
        """
        return self.draw(images, companions, generator)

    def finished(self, made: Tensor, scene: Scene) -> Tensor:
        """Return the final pictures (B, 3, H, W) in [0, 1]: the model's pictures, pasted back if the task does so."""
        return made

    def scores(self, made: Tensor, scene: Scene) -> dict[str, Tensor]:
        """Return the measures in ``figures`` by key, (B,) each; NaN for a picture without a meaningful value.

        Args:
            made: (B, 3, H, W) in [0, 1], from the decoder.
        """
        return {}

    def shown(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the drawn pictures for a report, by title, (B, 3, h, w) in [0, 1]."""
        return {}

    def conditions_without(self, conditioning: Conditioning) -> Conditioning | None:
        """Return conditions without the task's own part, as a baseline of the figures; None without a baseline."""
        return None


class TextToImage(Task):
    """Text alone."""

    name = "text-to-image"
    has_conditions = False

    def extra_channels(self, latent_channels: int) -> int:
        """Return 0."""
        return 0

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing beside the captions."""
        return {}

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """Nothing beside the captions."""
        return Conditioning()
