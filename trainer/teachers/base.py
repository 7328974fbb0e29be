"""What every family of teachers offers around its denoiser: text in, pixels in and out, and its facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning
from ...flash_core.process import VPProcess
from ..config import ModelSection
from ..errors import UserError
from .denoiser import DiffusersDenoiser


@dataclass(frozen=True)
class Outline:
    """A teacher as its configuration files describe it; the network is on the ``meta`` device and holds no weights.

    Attributes:
        denoiser: the network without weights, to be given adapters and counted.
        latent_shape: (C, h, w) at the resolution asked for.
        parameters: of the whole base.
        name: what the model calls itself.
    """

    denoiser: DiffusersDenoiser
    latent_shape: tuple[int, int, int]
    parameters: int
    name: str


class Teacher(ABC):
    """A diffusion model with everything around its denoiser.

    Class attributes:
        base: what a LoRA's metadata calls the base.
        transformer: whether the denoiser is a transformer, which decides how a LoRA is written.
        default_targets: what the adapted layers' paths end in unless a recipe says otherwise.

    Attributes:
        denoiser: the backbone, switched between roles.
        latent_shape: (C, h, w).
        scale_factor: pixels per latent pixel.
    """

    base: ClassVar[str]
    transformer: ClassVar[bool] = False
    default_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    denoiser: DiffusersDenoiser
    latent_shape: tuple[int, int, int]
    scale_factor: int
    name: str

    @classmethod
    @abstractmethod
    def load(cls, model: ModelSection, device: str, resolution: int | None) -> Teacher:
        """Load the weights."""

    @classmethod
    @abstractmethod
    def outline(cls, model: ModelSection, resolution: int | None) -> Outline:
        """Read the configuration files alone."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), float32, the posterior's mode."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1], float32; differentiable."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditions of the prompts, as the family's stock pipeline makes them."""

    @abstractmethod
    def unconditional(self, batch: int) -> Conditioning:
        """What the family's pipeline takes for no prompt, ``batch`` times."""

    @abstractmethod
    def weights_hash(self) -> str:
        """Identifies the base's weights."""

    @abstractmethod
    def release_encoders(self) -> None:
        """Free the memory of text and image encoders; :meth:`unconditional` and :meth:`decode` still work."""

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return next(self.denoiser.network.parameters()).device

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        _, height, width = self.latent_shape
        return height * self.scale_factor, width * self.scale_factor


def process_from_scheduler(config: dict[str, Any]) -> VPProcess:
    """The variance-preserving process a diffusers scheduler configuration describes.

    Raises:
        UserError: a schedule this package does not know.
    """
    prediction = config.get("prediction_type", "epsilon")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        return VPProcess(torch.cumprod(1 - betas, 0), prediction)
    try:
        return VPProcess.from_betas(
            schedule=config.get("beta_schedule", "linear"),
            beta_start=config.get("beta_start", 0.0001),
            beta_end=config.get("beta_end", 0.02),
            prediction=prediction,
            zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
            num_timesteps=config.get("num_train_timesteps", 1000),
        )
    except ValueError as error:
        raise UserError(f"the model's scheduler configuration can't be used: {error}") from error


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module's parameters hold."""
    return sum(value.numel() for value in module.parameters())
