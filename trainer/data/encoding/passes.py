"""A pass over the samples fills one store: its rows, the chunks that are missing, and what the pass works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from ...config import DataSection, MethodSection
from ...errors import UserError
from ...interrupts import StopRequest
from ..cache.manifest import Manifests
from ..cache.store import Keys, Store, sortable
from ..reading.samples import Source
from .examples import as_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...tasks.base import Task
    from ...teachers.base import Teacher

CHUNK_BYTES = 8 << 20  # of a file of the cache, about
CHUNK_ROWS = (16, 512)  # least and most


@dataclass(frozen=True)
class Work:
    """What all passes of a run share.

    Attributes:
        manifests: of the source of the samples.
        accelerator: None for a process alone.
        stop: asked between batches.
    """

    data: DataSection
    teacher: Teacher
    task: Task
    variants: int
    method: MethodSection
    manifests: Manifests
    accelerator: Accelerator | None
    stop: StopRequest

    @property
    def source(self) -> Source:
        """The undecoded samples."""
        return self.manifests.source

    @property
    def precision(self) -> str:
        """The dtype in which the teacher draws: of autocast, ``no`` without it."""
        return "no" if self.accelerator is None else str(self.accelerator.mixed_precision)

    @property
    def processes(self) -> PartialState:
        """The processes that encode together."""
        return PartialState()

    def own(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return this process's share of the chunks: one stretch of the source, so that each file is read once."""
        rank, ranks = self.processes.process_index, self.processes.num_processes
        return chunks[rank * len(chunks) // ranks : (rank + 1) * len(chunks) // ranks]


@dataclass(frozen=True)
class Chunk:
    """Rows that are written as one file.

    Attributes:
        rows: numbers of the missing rows, rising.
        frame: (height, width) of their pictures.
    """

    rows: NDArray[np.int64]
    frame: tuple[int, int]


@dataclass(frozen=True)
class Pass:
    """What one store must hold for a run.

    Attributes:
        kind: ``captions``, ``pictures`` or ``conditions``.
        what: the rows in words.
        keys: (n, 16) of the rows.
        frame: (n,) number of each row's frame.
        variants: rows of each sample.
    """

    kind: str
    what: str
    store: Store
    keys: Keys
    frame: NDArray[np.int32]
    variants: int = 1

    def missing_chunks(self, frames: tuple[tuple[int, int], ...], row_bytes: int) -> list[Chunk]:
        """Return the rows that the store lacks, cut into chunks of one frame each, in the order of the source.

        Equal keys are one row.

        Args:
            row_bytes: about the size of a row.
        """
        missing = np.flatnonzero(self.store.find(self.keys).missing)
        _, first = np.unique(sortable(self.keys[missing]), return_index=True)
        missing = missing[np.sort(first)]
        size = int(np.clip(CHUNK_BYTES // row_bytes, *CHUNK_ROWS))
        chunks: list[Chunk] = []
        for number, frame in enumerate(frames):
            rows = missing[self.frame[missing] == number]
            chunks += [Chunk(rows[start : start + size], frame) for start in range(0, len(rows), size)]
        return sorted(chunks, key=lambda chunk: int(chunk.rows[0]))

    def write(self, rows: Sequence[int] | NDArray[np.int64], tensors: Mapping[str, Tensor]) -> None:
        """Write encoded rows as a file of the store.

        Raises:
            UserError: a value is NaN or infinite; a cache would keep it for all later runs.
        """
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise UserError(
                    f"the model gave NaN or infinite values ({name}) for {self.what}; expected finite numbers. "
                    "Load the model in another precision (model.dtype: float32), or check its weights"
                )
        self.store.write([key.tobytes() for key in self.keys[rows]], tensors)


def changed(work: Work, unit: int, what: str) -> UserError:
    """Forget a unit's manifest, and return the error that says what has changed in it."""
    work.manifests.forget(unit)
    return UserError(f"{what} since the data were listed; run again, and the files are listed anew")


def row_bytes(part: Pass, teacher: Teacher, task: Task) -> int:
    """Return about the size of a row on disk; a task's conditions are hints, or taken to be as large as latents."""
    bytes_each = torch.finfo(part.store.dtype).bits // 8
    if part.kind == "captions":
        parts = as_rows(teacher.unconditional(1)).values()
        return sum(value.numel() * min(value.element_size(), bytes_each) for value in parts)
    if part.kind == "conditions" and task.gives_hint:
        height, width = teacher.resolution
        return 3 * height * width  # bytes, see packed()
    channels, height, width = teacher.latent_shape
    return channels * height * width * bytes_each
