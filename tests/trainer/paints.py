"""A text-to-image model that is solved exactly: what a sampler makes of it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning, Role
from flash_diffusion.flash_core.process import FlowProcess, VPProcess

SHAPE = (3, 4, 4)
COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0), "white": (1.0, 1.0, 1.0)}
SPREAD = 0.3  # standard deviation of every pixel around its prompt's colour


class Paints:
    """A text-to-image model whose data are Gaussian given the prompt, so that its best z0 is known in closed form."""

    latent_shape = SHAPE
    stochasticity: ClassVar[dict[int, float]] = {}
    device = torch.device("cpu")

    def __init__(self, bias: float = 0.0, process: VPProcess | FlowProcess | None = None) -> None:
        self.process = process or FlowProcess()
        self.denoiser = self
        self.bias = bias  # of the student's colours
        self.current: Role = "teacher"
        self.passes = self.feature_passes = 0

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        previous, self.current = self.current, role
        yield
        self.current = previous

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.passes += len(z_t)
        assert conditioning.vector is not None
        mean = conditioning.vector[:, :, None, None] + (self.bias if self.current == "student" else 0.0)
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in self.process.alpha_sigma(t))
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return self.process.output_from_z0(z_t, mean + gain * (z_t - alpha * mean), t)

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Two depths: the latents, and their colours at half the size."""
        assert self.current == "teacher"
        self.feature_passes += len(z_t)
        return [z_t, torch.nn.functional.avg_pool2d(z_t, 2)[:, :2].square()]

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(vector=torch.tensor([COLOURS[prompt] for prompt in prompts]))

    def unconditional(self, batch: int) -> Conditioning:
        return Conditioning(vector=torch.zeros(batch, 3))

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 3
