"""Prompts that were encoded before the text encoders were freed, drawn from as from the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ..tasks.base import Task
from ..teachers.base import Teacher
from ..teachers.denoiser import DiffusersDenoiser


@dataclass(frozen=True)
class EncodedPrompts:
    """The model as ``generate.sample_latents`` wants it, its prompts encoded before the encoders were freed.

    Attributes:
        conditioning: of all the prompts, with those of the task.
    """

    teacher: Teacher
    task: Task
    prompts: tuple[str, ...]
    conditioning: Conditioning

    @property
    def denoiser(self) -> DiffusersDenoiser:
        """The backbone."""
        return self.teacher.denoiser

    @property
    def device(self) -> torch.device:
        """Where latents go."""
        return self.teacher.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.teacher.latent_shape

    def unconditional(self, batch: int) -> Conditioning:
        """What guidance leads away from."""
        assert batch == len(self.prompts)
        return self.task.unconditional(self.conditioning, self.teacher.unconditional(batch))

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return self.teacher.decode(latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The conditions of all the prompts, which are what is asked for."""
        assert tuple(prompts) == self.prompts
        return self.conditioning

    def part(self, first: int, count: int) -> EncodedPrompts:
        """``count`` of the prompts from ``first`` on, or as many as there are."""
        prompts = self.prompts[first : first + count]
        index = torch.arange(first, first + len(prompts))
        return replace(self, prompts=prompts, conditioning=self.conditioning.rows(index))
