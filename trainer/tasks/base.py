"""What a task is: how a picture becomes conditions, and what guidance leaves out.

A task works in two halves. :meth:`Task.draw` makes the pictures a sample is conditioned on (a mask, a small picture,
edges), of what lies beside the training picture or at random; :meth:`Task.encode` brings them into what the network
reads. Evaluations keep the drawn pictures: they are shown, and measured against.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...flash_core.denoiser import Conditioning, unconditional_branch
from ..config import Section
from .figures import Figure, Scene

if TYPE_CHECKING:
    from ..teachers.base import Teacher


class NoOptions(Section):
    """A task without settings."""


class Task(ABC):
    """A kind of conditional generation.

    Class attributes:
        name: as a recipe and a LoRA's metadata call it.
        options_class: its settings in a recipe, ``task.options``.
        companions: the pictures that may lie beside a training picture, by name, such as a mask; what is not there, the
            task draws.
        dropped: the parts of the conditions that the unconditional branch gets as zeros.
        reads_text: whether captions say what to make; where they don't, every caption is the empty one.
        gives_hint: whether its conditions are a hint, which a ControlNet or T2I-adapter (``model.control``) reads.
        figures: what an evaluation measures of each picture, see :meth:`scores`.
        many_answers: whether many pictures answer the same conditions, so that a set of them is measured as a whole,
            by its Fréchet distance, too.
        demo_captions: the demo's general captions that the task is evaluated on; none is all.
        without: what :meth:`conditions_without` leaves out, in words: "without the hint".
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Section]] = NoOptions
    companions: ClassVar[tuple[str, ...]] = ()
    dropped: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = True
    gives_hint: ClassVar[bool] = False
    figures: ClassVar[tuple[Figure, ...]] = ()
    many_answers: ClassVar[bool] = False
    demo_captions: ClassVar[tuple[str, ...]] = ()
    without: ClassVar[str] = ""

    def __init__(self, options: Section) -> None:
        self.options = options

    @abstractmethod
    def extra_channels(self, latent_channels: int) -> int:
        """How many channels the network reads beside the noisy latent's C."""

    @property
    def gives_image_tokens(self) -> bool:
        """Whether its conditions are a picture's tokens, which an IP-Adapter (``model.image_adapter``) reads."""
        return False

    @abstractmethod
    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The pictures, by name, that B samples are conditioned on beside their captions, each with B rows.

        Args:
            images: (B, 3, H, W) in [-1, 1], on the teacher's device.
            companions: what lies beside every one of these pictures: (B, 3, H, W) in [-1, 1], masks (B, 1, H, W) in
                0..1, which are called ``mask``.
            generator: on the CPU; the only source of randomness.
        """

    @abstractmethod
    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """What :meth:`draw` made, as the network reads it.

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
        """The task's own conditions of a batch: drawn and encoded, in full precision whatever autocast is on.

        What is drawn in few bits differs from what users give a model: edges are lost, colours rounded.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.encode(self.draw(images, companions or {}, generator), teacher)

    def unconditional(self, conditioning: Conditioning, empty: Conditioning) -> Conditioning:
        """What guidance compares with; see :func:`~...flash_core.denoiser.unconditional_branch`."""
        return unconditional_branch(conditioning, empty, self.dropped)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def draw_for_evaluation(
        self, images: Tensor, others: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The pictures that samples are evaluated with, as :meth:`draw` makes them.

        Args:
            others: (B, 3, H, W) in [-1, 1], for each sample another picture than its own, for tasks that combine two.
        """
        return self.draw(images, companions, generator)

    def finished(self, made: Tensor, scene: Scene) -> Tensor:
        """What a user gets of a model's pictures (B, 3, H, W) in [0, 1]: the same, unless the task puts them back."""
        return made

    def scores(self, made: Tensor, scene: Scene) -> dict[str, Tensor]:
        """Every one of ``figures`` by its key, (B,) each; NaN where it means nothing for a picture.

        Args:
            made: (B, 3, H, W) in [0, 1], as they come from the decoder.
        """
        return {}

    def shown(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The drawn pictures that a report shows, by their titles, (B, 3, h, w) in [0, 1]."""
        return {}

    def conditions_without(self, conditioning: Conditioning) -> Conditioning | None:
        """The conditions that the task's own figures are compared with, where leaving them out makes sense."""
        return None


class TextToImage(Task):
    """Text alone."""

    name = "text-to-image"

    def extra_channels(self, latent_channels: int) -> int:
        """None."""
        return 0

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing beside the captions."""
        return {}

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """Nothing beside the captions."""
        return Conditioning()
