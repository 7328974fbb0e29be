"""Record teacher trajectories once, keep them in the run's folder, and replay them in every epoch."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ....flash_core.distiller import Distiller, Trajectory
from ....flash_core.process import Process
from ....flash_core.runs.transfer import sent
from ...config import Recipe, TrajectorySection
from ...errors import UserError
from ...files import write_whole
from ...interrupts import StopRequest
from ...seeds import stream
from ...teachers.hashes import weights_hash
from ..cache.store import Keys, Places, Store, as_keys, key_of
from ..cache.stores import process_hash
from ..encoding.examples import CachedExamples
from ..encoding.lookahead import one_core_each
from .order import Order

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...teachers.conditions.control import Control

ENDED = "ended"  # a file in the folder: how many trajectories the time was enough for
FACTS = "trajectories.json"


@dataclass(frozen=True)
class TrajectoryBank:
    """N recorded trajectories on disk.

    Attributes:
        store: holds them.
        places: where each is.
        indices: the M grid indices that were kept.
        frames: (N,) number of each one's frame; None if all have the same.
    """

    store: Store
    places: Places
    indices: tuple[int, ...]
    frames: Tensor | None

    def __len__(self) -> int:
        return len(self.places.file)

    def batch(
        self,
        index: Tensor,
        examples: CachedExamples,
        unconditional: Callable[[Conditioning], Conditioning],
        device: torch.device | str,
    ) -> Trajectory:
        """Return the trajectories at ``index`` (B,), on ``device``; ``unconditional`` makes guidance's other branch.

        Raises:
            UserError: a file is damaged; it is removed.
        """
        rows = self.store.read(self.places.part(index.numpy()))
        return as_trajectory(rows, self.indices, examples, unconditional, device)


def as_trajectory(
    rows: Mapping[str, Tensor],
    indices: tuple[int, ...],
    examples: CachedExamples,
    unconditional: Callable[[Conditioning], Conditioning],
    device: torch.device | str,
) -> Trajectory:
    """Return recorded rows (B, ...) as trajectories on ``device``, with the conditions of their samples."""
    z0, conditioning = examples.batch(rows["sample"], device, rows["caption"])
    z_teacher = sent(rows["z_teacher"], device)
    return Trajectory(
        indices,
        sent(rows["states"], device).transpose(0, 1),
        z_teacher,
        z0 if examples.has_latents else z_teacher,
        rows["guidance"].to(device),
        conditioning,
        unconditional(conditioning),
    )


@dataclass(frozen=True)
class Recorder:
    """Solves batches of trajectories from pure noise, and writes each batch as one file.

    A batch has its own random stream and, on a CPU, one core: its bits depend on its number alone.

    Attributes:
        store: where the files are.
        order: of the samples; trajectory n begins with the n-th one.
        batch: trajectories of a batch.
        unconditional: makes guidance's other branch.
        fingerprint: see :func:`trajectory_fingerprint`.
        caption_dropout: share of the empty prompt.
    """

    store: Store
    order: Order
    batch: int
    distiller: Distiller
    examples: CachedExamples
    unconditional: Callable[[Conditioning], Conditioning]
    accelerator: Accelerator
    seed: int
    fingerprint: str
    caption_dropout: float = 0.0

    def keys(self, first: int, count: int) -> Keys:
        """Return the keys of a batch's rows.

        A batch is recorded with one random stream, so its size counts: a shorter last batch has other keys.
        """
        return as_keys(key_of("trajectory", self.fingerprint, first + row, count) for row in range(count))

    def record(self, number: int, first: int, count: int) -> dict[str, Tensor]:
        """Solve a batch in the current role, write it, and return its rows (count, ...)."""
        index = self.order.indices(first, count)
        caption = self.order.captions(first, self.examples.caption_counts(index), self.caption_dropout)
        z0, conditioning = self.examples.batch(index, self.accelerator.device, caption)
        with self.accelerator.autocast():
            trajectory = self.distiller.trajectory(
                z0, conditioning, self.unconditional(conditioning), stream(self.seed, "trajectory", number)
            )
        rows = {
            "states": trajectory.states.transpose(0, 1),
            "z_teacher": trajectory.z_teacher,
            "guidance": trajectory.guidance,
            "sample": index,
            "caption": caption,
        }
        self.store.write([key.tobytes() for key in self.keys(first, count)], rows)
        return rows

    def describe(self, folder: Path) -> None:
        """Write whose trajectories the folder holds. For the main process."""
        facts = {"fingerprint": self.fingerprint, "indices": self.distiller.recorded_indices()}
        text = json.dumps(facts) + "\n"
        write_whole(folder / FACTS, lambda partial: partial.write_text(text, encoding="utf-8"))


def own_batches(section: TrajectorySection, accelerator: Accelerator) -> list[tuple[int, int, int]]:
    """Return the batches that this process records, each as (number, first trajectory, trajectories)."""
    return _batches(section)[accelerator.process_index :: accelerator.num_processes]


def _batches(section: TrajectorySection) -> list[tuple[int, int, int]]:
    return [
        (number, first, min(section.batch, section.count - first))
        for number, first in enumerate(range(0, section.count, section.batch))
    ]


def check_recorded(folder: Path, fingerprint: str) -> None:
    """Check that the folder's trajectories, if there are any, are those of ``fingerprint``.

    Raises:
        UserError: they are of another teacher, data or method.
    """
    there = sorted(folder.glob("*.safetensors"))
    if not there:
        return
    try:
        known = json.loads((folder / FACTS).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known != fingerprint:
        raise UserError(
            f"{folder} holds trajectories of another teacher, data or method (pictures and captions count by their "
            "content, and trajectories of version 0.1 count as others); remove the folder, or choose another --output"
        )


def record_trajectories(
    folder: Path,
    section: TrajectorySection,
    distiller: Distiller,
    examples: CachedExamples,
    unconditional: Callable[[Conditioning], Conditioning],
    accelerator: Accelerator,
    seed: int,
    fingerprint: str,
    advance: Callable[[int, float | None], None],
    stop: StopRequest,
    caption_dropout: float = 0.0,
) -> TrajectoryBank:
    """Compute the trajectories that are missing in ``folder``, and return them all.

    Each batch has its own file and its own generator. So a killed run computes only the missing batches, and several
    processes share the work.

    Args:
        section: how many trajectories; ``max_minutes`` ends the recording early, after at least one batch.
        fingerprint: see :func:`trajectory_fingerprint`; a folder with another fingerprint is refused.
        advance: called after each batch with its trajectories, and the seconds they took or None where the file was
            already there.
        stop: when asked, no further batch begins; those that are recorded stay.
        caption_dropout: share of the empty prompt.

    Raises:
        Interrupted: ``stop`` was asked.
        UserError: the folder holds trajectories of another recipe.
    """
    check_recorded(folder, fingerprint)
    order = Order(len(examples), seed, examples.frames, section.batch)
    store = Store(folder)
    recorder = Recorder(
        *(store, order, section.batch, distiller, examples, unconditional, accelerator, seed, fingerprint),
        caption_dropout,
    )
    keys = np.concatenate([recorder.keys(first, count) for _, first, count in _batches(section)])
    if accelerator.is_main_process:
        recorder.describe(folder)
    present = ~store.find(keys).missing
    accelerator.wait_for_everyone()
    started = time.monotonic()

    def record(number: int, first: int, count: int) -> float | None:
        """Record one batch; return the seconds it took, or None when the time was over or ``stop`` was asked."""
        begin = time.monotonic()
        if stop.asked:
            return None
        if section.max_minutes is not None and number > 0 and begin - started > 60 * section.max_minutes:
            return None
        recorder.record(number, first, count)
        return time.monotonic() - begin

    ended = _ended(folder, section.count)
    missing = []
    for number, first, count in own_batches(section, accelerator):
        if present[first : first + count].all():
            advance(count, None)
        elif first < ended:  # not one that the time was too short for
            missing.append((number, first, count))
    with distiller.denoiser.role("teacher"):  # once for all threads: the role belongs to the network
        for (_, _, count), seconds in side_by_side(record, missing, accelerator.device):
            if seconds is not None:
                advance(count, seconds)
    stop.check(accelerator)
    accelerator.wait_for_everyone()
    places = store.find(keys)
    found = np.flatnonzero(~places.missing)
    if accelerator.is_main_process and len(found) < section.count:
        text = f"{int(found[-1]) + 1} of {section.count}\n"
        write_whole(folder / ENDED, lambda partial: partial.write_text(text, encoding="utf-8"))
    accelerator.wait_for_everyone()
    return TrajectoryBank(store, places.part(found), distiller.recorded_indices(), _frames(order, section, found))


def _ended(folder: Path, count: int) -> float:
    """Return how many of ``count`` trajectories the time was enough for in an earlier recording; else infinity."""
    try:
        ended, wanted = (folder / ENDED).read_text(encoding="utf-8").split(" of ")
        return int(ended) if int(wanted) == count else float("inf")
    except (OSError, ValueError):
        return float("inf")


def _frames(order: Order, section: TrajectorySection, found: np.ndarray) -> Tensor | None:
    """Return the frame of each trajectory, None if all have the same."""
    if order.frames is None or len(order.frames.unique()) == 1:
        return None
    frames = [order.frames[order.indices(first, count)] for _, first, count in _batches(section)]
    return torch.cat(frames)[torch.from_numpy(found)]


def side_by_side(
    record: Callable[[int, int, int], float | None], batches: Sequence[tuple[int, int, int]], device: torch.device
) -> Iterator[tuple[tuple[int, int, int], float | None]]:
    """Yield each batch with the seconds it cost; on a CPU several are recorded side by side, one core each."""
    if device.type != "cpu":
        for batch in batches:
            yield batch, record(*batch)
        return
    with one_core_each() as (pool, threads):
        futures = {pool.submit(record, *batch): batch for batch in batches}
        for future in as_completed(futures):
            seconds = future.result()
            yield futures[future], None if seconds is None else seconds / threads


def trajectory_fingerprint(
    recipe: Recipe, data: str, teacher_hash: str, process: Process, control: Control | None
) -> str:
    """Return a hash that differs where recorded trajectories would differ.

    Args:
        data: the fingerprint of the examples: contents of pictures, captions and conditions.
        teacher_hash: of the base's weights; holds an IP-Adapter's weights, but not its scale and encoder.
        process: of the teacher; its noise levels are in a configuration file, not in the weights.
        control: its weights and scale count.
    """
    method, model = recipe.method, recipe.model
    beside: list[object] = []
    if model.image_adapter is not None:
        beside.append((model.image_adapter.image_encoder, model.image_adapter.scale))
    if method.guidance_interval is not None:
        beside.append(("guidance interval", method.guidance_interval))
    if control is not None:
        beside.append((weights_hash(control.network), control.scale))
    facts = (
        teacher_hash,
        process_hash(process),
        data,
        recipe.data.caption_dropout,
        method.teacher_steps,
        method.solver,
        method.guidance,
        recipe.trajectories.batch,
        recipe.seed,
        recipe.precision,
        *beside,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
