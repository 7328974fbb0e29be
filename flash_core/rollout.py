"""What one training step starts from: the teacher's solutions, drawn for the step or recorded once and replayed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .denoiser import Conditioning


@dataclass(frozen=True)
class Rollout:
    """What one batch costs most: where each sample starts and where the teacher takes it. All of B samples.

    Attributes:
        z_t: (B, C, H, W) latents at their start.
        t: (B,) timesteps of the start.
        z_teacher: (B, C, H, W) the teacher's solution.
        z0: (B, C, H, W) data latents.
        guidance: (B,) the teacher's guidance scale.
    """

    z_t: Tensor
    t: Tensor
    z_teacher: Tensor
    z0: Tensor
    guidance: Tensor
    conditioning: Conditioning
    unconditional: Conditioning


@dataclass(frozen=True)
class Trajectory:
    """A teacher's solutions from pure noise with the states it passed: several rollouts for the price of one.

    Attributes:
        indices: the M grid indices that were kept, ascending.
        states: (M, B, C, H, W) the latents at those indices.
    """

    indices: tuple[int, ...]
    states: Tensor
    z_teacher: Tensor
    z0: Tensor
    guidance: Tensor
    conditioning: Conditioning
    unconditional: Conditioning

    def rows(self, index: Tensor) -> Trajectory:
        """The samples at ``index`` (b,)."""
        return Trajectory(
            self.indices,
            self.states[:, index],
            self.z_teacher[index],
            self.z0[index],
            self.guidance[index],
            self.conditioning.rows(index),
            self.unconditional.rows(index),
        )
