"""What a run learns from: prompts with their conditions, and recorded trajectories of the teacher in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ....flash_core.rollout import Trajectory
from ....flash_core.runs.seeds import stream


@dataclass(frozen=True)
class Examples:
    """The conditions of P prompts, and data latents or none.

    Attributes:
        conditions: (P) of the prompts.
        unconditional: (1) of guidance's other branch.
        latents: (N, C, h, w) scaled for the network; None where samples start on the teacher's own trajectories.
        shape: (C, h, w) of a latent.
        device: of the network.
    """

    conditions: Conditioning
    unconditional: Conditioning
    latents: Tensor | None
    shape: tuple[int, ...]
    device: torch.device

    def __len__(self) -> int:
        """Return the number of different samples: latents, or prompts."""
        return len(self.conditions) if self.latents is None else len(self.latents)

    def conditions_of(self, samples: Tensor) -> tuple[Conditioning, Conditioning]:
        """Return the conditions of samples (b,), and those of the unconditional branch. One prompt may serve all."""
        prompts = samples % len(self.conditions)
        return self.conditions.rows(prompts), self.unconditional.rows(torch.zeros_like(prompts))

    def latents_of(self, samples: Tensor) -> Tensor:
        """Return the data latents of samples (b,); zeros where there are none."""
        if self.latents is None:
            return torch.zeros(len(samples), *self.shape, device=self.device)
        return self.latents[samples.to(self.latents.device)]


def in_order(length: int, seed: int, position: int, count: int) -> Tensor:
    """Return ``count`` of ``length`` samples from a position on: every epoch has a random order of its own.

    The order is a function of seed and position, so a saved run needs to keep only the position.
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(position, length)
        part = torch.randperm(length, generator=stream(seed, "order", epoch))[offset : offset + count]
        parts.append(part)
        position, count = position + len(part), count - len(part)
    return torch.cat(parts)


class TrajectoryBank:
    """Recorded trajectories in main memory.

    Args:
        indices: the M indices of the teacher's grid whose states are kept.
        parts: as :meth:`part_of` makes them.
    """

    def __init__(self, indices: Sequence[int], parts: Sequence[dict[str, Tensor]]) -> None:
        self.indices = tuple(indices)
        self.tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def __len__(self) -> int:
        return len(self.tensors["samples"])

    @staticmethod
    def part_of(trajectory: Trajectory, samples: Tensor) -> dict[str, Tensor]:
        """Return the tensors of b trajectories by name, each (b, ...), on the CPU."""
        found = {
            "states": trajectory.states.transpose(0, 1),  # (b, M, C, h, w)
            "z_teacher": trajectory.z_teacher,
            "guidance": trajectory.guidance,
            "samples": samples,
        }
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def batch(self, index: Tensor, examples: Examples) -> Trajectory:
        """Return the trajectories at ``index`` (b,) on the network's device."""
        rows = {name: value[index] for name, value in self.tensors.items()}
        conditioning, unconditional = examples.conditions_of(rows["samples"])
        z_teacher = rows["z_teacher"].to(examples.device)
        return Trajectory(
            self.indices,
            rows["states"].transpose(0, 1).to(examples.device),
            z_teacher,
            z_teacher,
            rows["guidance"].to(examples.device),
            conditioning,
            unconditional,
        )
