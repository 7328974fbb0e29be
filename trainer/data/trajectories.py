"""Record teacher trajectories once, keep them in the run's folder, and replay them in every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ...flash_core.distiller import Distiller, Trajectory
from ..config import Recipe, TrajectorySection
from ..errors import UserError
from ..files import write_whole, writing
from ..interrupts import StopRequest
from ..seeds import stream
from ..teachers.hashes import weights_hash
from .encode import Examples
from .order import Order

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..teachers.conditions.control import Control

MAX_THREADS = 8  # batches recorded side by side on a CPU; each holds its activations in memory


@dataclass(frozen=True)
class TrajectoryBank:
    """N recorded trajectories on the CPU.

    Attributes:
        indices: the M grid indices that were kept.
        states: (N, M, C, h, w) latents there.
        z_teacher: (N, C, h, w) where they end.
        guidance: (N,).
        sample: (N,) index of the training example whose conditions each trajectory has.
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
        """Return the trajectories at ``index`` (B,), on ``device``; ``unconditional`` makes guidance's other branch."""
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


def own_batches(section: TrajectorySection, accelerator: Accelerator) -> list[tuple[int, int, int]]:
    """Return the batches that this process records, each as (number, first trajectory, trajectories)."""
    batches = [
        (number, first, min(section.batch, section.count - first))
        for number, first in enumerate(range(0, section.count, section.batch))
    ]
    return batches[accelerator.process_index :: accelerator.num_processes]


def record_trajectories(
    folder: Path,
    section: TrajectorySection,
    distiller: Distiller,
    examples: Examples,
    unconditional: Callable[[Conditioning], Conditioning],
    accelerator: Accelerator,
    seed: int,
    fingerprint: str,
    advance: Callable[[int, float | None], None],
    stop: StopRequest,
) -> TrajectoryBank:
    """Compute the trajectories that are missing in ``folder``, then read them all.

    Each batch has its own file and its own generator. So a killed run computes only the missing batches, and several
    processes share the work.

    Args:
        section: how many trajectories; ``max_minutes`` ends the recording early, after at least one batch.
        fingerprint: see :func:`trajectory_fingerprint`; a folder with another fingerprint is refused.
        advance: called after each batch with its trajectories, and the seconds they took or None where the file was
            already there.
        stop: when asked, no further batch begins; those that are recorded stay.

    Raises:
        Interrupted: ``stop`` was asked.
        UserError: the folder holds trajectories of another recipe, or an unreadable file.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    order = Order(len(examples), seed)
    started = time.monotonic()
    done = folder / "complete"

    def record(number: int, first: int, count: int) -> float | None:
        """Record one batch; return the seconds it took, or None when the time was over or ``stop`` was asked."""
        begin = time.monotonic()
        if stop.asked:
            return None
        if section.max_minutes is not None and number > 0 and begin - started > 60 * section.max_minutes:
            return None
        index = order.indices(first, count)
        z0, conditioning = examples.batch(index, accelerator.device)
        with accelerator.autocast():
            trajectory = distiller.trajectory(
                z0, conditioning, unconditional(conditioning), stream(seed, "trajectory", number)
            )
        _write(folder / f"{number:05d}.safetensors", trajectory, index, fingerprint)
        return time.monotonic() - begin

    batches = [] if done.exists() else own_batches(section, accelerator)
    missing = [batch for batch in batches if not (folder / f"{batch[0]:05d}.safetensors").exists()]
    for batch in batches:
        if batch not in missing:
            advance(batch[2], None)
    with distiller.denoiser.role("teacher"):  # once for all threads: the role belongs to the network
        for (_, _, count), seconds in in_threads(record, missing, accelerator.device):
            if seconds is not None:
                advance(count, seconds)
    stop.check(accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_whole(done, Path.touch)
    accelerator.wait_for_everyone()
    return _read(folder, fingerprint)


def in_threads(
    record: Callable[[int, int, int], float | None], batches: Sequence[tuple[int, int, int]], device: torch.device
) -> Iterator[tuple[tuple[int, int, int], float | None]]:
    """Yield each batch with the seconds it cost, on a CPU from as many threads as torch may use, one core each.

    Batches side by side keep two cores busy, where two cores on one batch wait for each other (1.9 against 1.4 times
    one core). And a batch computed on one core has the same bits whatever the number of cores.
    """
    if device.type != "cpu":
        for batch in batches:
            yield batch, record(*batch)
        return
    cores = torch.get_num_threads()
    threads = min(cores, MAX_THREADS)
    torch.set_num_threads(1)
    executor, wait = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)), True
    try:
        futures = {executor.submit(record, *batch): batch for batch in batches}
        for future in as_completed(futures):
            seconds = future.result()
            yield futures[future], None if seconds is None else seconds / threads
    except (KeyboardInterrupt, GeneratorExit):  # stop now: don't wait for the batches that are being recorded
        wait = False
        raise
    finally:
        executor.shutdown(wait, cancel_futures=True)
        torch.set_num_threads(cores)


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
                        f"{folder} holds trajectories of another teacher, data or method; remove the folder, "
                        "or choose another --output"
                    )
                parts.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); remove it and run again with --resume") from error
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "indices"}
    return TrajectoryBank(indices=tuple(parts[0]["indices"].tolist()), **joined)


def trajectory_fingerprint(recipe: Recipe, teacher_hash: str, control: Control | None) -> str:
    """Return a text that differs where recorded trajectories would differ.

    The teacher's hash holds an IP-Adapter's weights; the adapter's scale and encoder, and a ControlNet's weights and
    scale, are added here. A recipe without them adds nothing, so that the recordings of plain models stay valid.
    """
    method, model = recipe.method, recipe.model
    beside: list[object] = []
    if model.image_adapter is not None:
        beside.append((model.image_adapter.image_encoder, model.image_adapter.scale))
    if control is not None:
        beside.append((weights_hash(control.network), control.scale))
    if not model.t5:
        beside.append("without T5")
    return repr(
        (
            teacher_hash,
            recipe.data.model_dump(mode="json"),
            recipe.task.model_dump(mode="json"),
            method.teacher_steps,
            method.solver,
            method.guidance,
            recipe.trajectories.count,
            recipe.trajectories.batch,
            recipe.seed,
            recipe.precision,
            *beside,
        )
    )
