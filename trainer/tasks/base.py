"""What a task is: how a picture becomes conditions, and what guidance leaves out."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
        dropped: the parts of the conditions that the unconditional branch gets as zeros.
        reads_text: whether captions say what to make; where they don't, every caption is the empty one.
    """

    name: ClassVar[str]
    options_class: ClassVar[type[Section]] = NoOptions
    dropped: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = True

    def __init__(self, options: Section) -> None:
        self.options = options

    @abstractmethod
    def extra_channels(self, latent_channels: int) -> int:
        """How many channels the network reads beside the noisy latent's C."""

    @abstractmethod
    def conditions(self, images: Tensor, teacher: Teacher, generator: torch.Generator) -> Conditioning:
        """The task's own conditions of a batch, beside those of its captions.

        Args:
            images: (B, 3, H, W) in [-1, 1], on the teacher's device.
            teacher: encodes pictures.
            generator: on the CPU; the only source of randomness.
        """

    def unconditional(self, conditioning: Conditioning, empty: Conditioning) -> Conditioning:
        """What guidance compares with; see :func:`~...flash_core.denoiser.unconditional_branch`."""
        return unconditional_branch(conditioning, empty, self.dropped)


class TextToImage(Task):
    """Text alone."""

    name = "text-to-image"

    def extra_channels(self, latent_channels: int) -> int:
        """None."""
        return 0

    def conditions(self, images: Tensor, teacher: Teacher, generator: torch.Generator) -> Conditioning:
        """Nothing beside the captions."""
        return Conditioning()
