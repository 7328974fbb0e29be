"""Teacher trajectories for small budgets: computed once, kept beside the run, replayed in every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ...flash_core.distiller import Distiller, Trajectory
from ..config import TrajectorySection
from ..errors import UserError
from ..files import write_whole
from ..seeds import stream
from .encode import Examples
from .order import Order

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class TrajectoryBank:
    """N recorded trajectories on the CPU.

    Attributes:
        indices: the M grid indices that were kept.
        states: (N, M, C, h, w) latents there.
        z_teacher: (N, C, h, w) where they end.
        guidance: (N,).
        sample: (N,) the training example whose conditions each was made with.
    """

    indices: tuple[int, ...]
    states: Tensor
    z_teacher: Tensor
    guidance: Tensor
    sample: Tensor

    def __len__(self) -> int:
        return len(self.sample)

    def batch(
        self,
        index: Tensor,
        examples: Examples,
        unconditional: Callable[[Conditioning], Conditioning],
        device: torch.device | str,
    ) -> Trajectory:
        """The trajectories at ``index`` (B,), on ``device``; ``unconditional`` makes a branch from the conditions."""
        z0, conditioning = examples.batch(self.sample[index], device)
        return Trajectory(
            self.indices,
            self.states[index].transpose(0, 1).to(device),
            self.z_teacher[index].to(device),
            z0,
            self.guidance[index].to(device),
            conditioning,
            unconditional(conditioning),
        )


def record_trajectories(
    folder: Path,
    section: TrajectorySection,
    distiller: Distiller,
    examples: Examples,
    unconditional: Callable[[Conditioning], Conditioning],
    accelerator: Accelerator,
    seed: int,
    fingerprint: str,
    advance: Callable[[int], None],
) -> TrajectoryBank:
    """Compute what is missing in ``folder``, then read it all.

    Each batch has its own file and its own generator, so that a run that was killed here computes the rest alone, and
    several processes share the work.

    Args:
        fingerprint: of everything the trajectories depend on; a folder of another one is refused.
        advance: called with the number of trajectories that became ready.

    Raises:
        UserError: the folder holds trajectories of another recipe, or an unreadable file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = Order(len(examples), seed)
    started = time.monotonic()
    batches = [
        (number, first, min(section.batch, section.count - first))
        for number, first in enumerate(range(0, section.count, section.batch))
    ]
    done = folder / "complete"
    for number, first, count in batches:
        if number % accelerator.num_processes != accelerator.process_index or done.exists():
            continue
        path = folder / f"{number:05d}.safetensors"
        if not path.exists():
            minutes = (time.monotonic() - started) / 60
            if section.max_minutes is not None and number > 0 and minutes > section.max_minutes:
                break
            index = order.indices(first, count)
            z0, conditioning = examples.batch(index, accelerator.device)
            trajectory = distiller.trajectory(
                z0, conditioning, unconditional(conditioning), stream(seed, "trajectory", number)
            )
            _write(path, trajectory, index, fingerprint)
        advance(count)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done.touch()
    accelerator.wait_for_everyone()
    return _read(folder, fingerprint)


def _write(path: Path, trajectory: Trajectory, sample: Tensor, fingerprint: str) -> None:
    tensors = {
        "indices": torch.tensor(trajectory.indices),
        "states": trajectory.states.transpose(0, 1).contiguous().cpu(),
        "z_teacher": trajectory.z_teacher.contiguous().cpu(),
        "guidance": trajectory.guidance.cpu(),
        "sample": sample,
    }
    write_whole(path, lambda partial: save_file(tensors, partial, metadata={"fingerprint": fingerprint}))


def _read(folder: Path, fingerprint: str) -> TrajectoryBank:
    parts: list[dict[str, Tensor]] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != fingerprint:
                    raise UserError(
                        f"{folder} holds trajectories of another teacher, data or method; remove that folder, "
                        "or choose another --output"
                    )
                parts.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run again with --resume") from error
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "indices"}
    return TrajectoryBank(indices=tuple(parts[0]["indices"].tolist()), **joined)
