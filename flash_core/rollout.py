"""The start of a training step: the teacher's solutions, drawn for the step or recorded once and replayed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .denoiser import Conditioning


@dataclass(frozen=True)
class Rollout:
    """The start of each sample of a batch, and the teacher's solution from there.

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

    def rows(self, index: Tensor) -> Rollout:
        """Return the samples at ``index`` (b,)."""
        return Rollout(
            self.z_t[index],
            self.t[index],
            self.z_teacher[index],
            self.z0[index],
            self.guidance[index],
            self.conditioning.rows(index),
            self.unconditional.rows(index),
        )


@dataclass(frozen=True)
class Trajectory:
    """The teacher's solutions from pure noise with the states on the path: the starts of several rollouts.

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
        """Return the samples at ``index`` (b,)."""
        return Trajectory(
            self.indices,
            self.states[:, index],
            self.z_teacher[index],
            self.z0[index],
            self.guidance[index],
            self.conditioning.rows(index),
            self.unconditional.rows(index),
        )
