"""The frozen teacher's hidden states of a picture: features that only a DMD or adversarial term could have seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ....flash_core.denoiser import Conditioning, Denoiser

TIMESTEP = 100  # of uniform time 0..999: little noise, so that the states are the picture's, not the noise's
SEED = 0


class TeacherStates:
    """Describe latents by the teacher's hidden states, averaged over space; no adapter is on, no caption is given.

    All latents get the same noise, so that equal latents have equal states.
    """

    title = "the teacher’s hidden states"

    def __init__(self, denoiser: Denoiser, unconditional: Callable[[int], Conditioning]) -> None:
        self.denoiser = denoiser
        self.unconditional = unconditional

    def __call__(self, latents: Tensor) -> Tensor:
        """Return features (B, D), float32 on the CPU, of latents (B, C, h, w); D = the channels of all blocks."""
        process, count = self.denoiser.process, len(latents)
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(SEED)).to(latents)
        t = process.uniform_timestep(torch.full((count,), TIMESTEP)).to(latents.device)
        with torch.inference_mode(), self.denoiser.role("teacher"):
            z_t = process.add_noise(latents, noise.expand_as(latents), t)
            maps = self.denoiser.features(z_t, t, self.unconditional(count))
            return torch.cat([states.float().mean((2, 3)) for states in maps], 1).cpu()
