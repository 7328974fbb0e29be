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
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Section]] = NoOptions
    companions: ClassVar[tuple[str, ...]] = ()
    dropped: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = True

    def __init__(self, options: Section) -> None:
        self.options = options

    @abstractmethod
    def extra_channels(self, latent_channels: int) -> int:
        """How many channels the network reads beside the noisy latent's C."""

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
        """The task's own conditions of a batch: drawn and encoded."""
        return self.encode(self.draw(images, companions or {}, generator), teacher)

    def unconditional(self, conditioning: Conditioning, empty: Conditioning) -> Conditioning:
        """What guidance compares with; see :func:`~...flash_core.denoiser.unconditional_branch`."""
        return unconditional_branch(conditioning, empty, self.dropped)


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
