"""A pass over the samples fills one store: its rows, the chunks that are missing, and what the pass works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray

from ...config import DataSection, MethodSection
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
    def processes(self) -> PartialState:
        """The processes that encode together."""
        return PartialState()

    def own(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return this process's share of the chunks."""
        return chunks[self.processes.process_index :: self.processes.num_processes]


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
        """Return the rows that the store lacks, cut into chunks of one frame each; equal keys are one row.

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
        return chunks


def row_bytes(part: Pass, teacher: Teacher) -> int:
    """Return the size of a row on disk; a task's conditions are taken to be as large as latents."""
    bytes_each = torch.finfo(part.store.dtype).bits // 8
    if part.kind == "captions":
        return sum(value.numel() for value in as_rows(teacher.unconditional(1)).values()) * bytes_each
    channels, height, width = teacher.latent_shape
    return channels * height * width * bytes_each
