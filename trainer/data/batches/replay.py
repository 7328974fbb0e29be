"""A bank of teacher trajectories that is refreshed while the student trains: new ones replace the oldest.

Each process has a bank of its own, from every n-th recorded file, and waits for no other process. A trajectory depends
on the seed and its number alone. So a resumed run reads the files that are there, records the missing ones again, and
goes on with the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....flash_core.distiller import Trajectory
from ...errors import UserError
from ...interrupts import StopRequest
from ..cache.store import Places, check_file
from .rounds import Rounds
from .trajectories import Recorder, as_trajectory, side_by_side

Rows = dict[str, Tensor]

logger = logging.getLogger(__name__)


@dataclass
class ReplayBank:
    """The trajectories of one process, recorded as its rounds need them, ``recorder.batch`` in a file.

    Attributes:
        recorder: solves the trajectories, and writes them to disk.
        rounds: which trajectories make each batch of training.
        memory: bytes of trajectories that stay in memory too; the others are read from disk.
    """

    recorder: Recorder
    rounds: Rounds
    memory: float
    _there: set[int] = field(default_factory=set)  # files whose trajectories can be read
    _kept: dict[int, Rows] = field(default_factory=dict)  # file -> its rows, in memory
    _removed: int = 0  # files before this one are gone

    def made(self, batch: int) -> int:
        """Return how many trajectories this process makes until a batch of training."""
        return self.rounds.made(batch)

    def due(self, batches: range) -> bool:
        """Return True where batches of training need trajectories that are not recorded yet."""
        return not self._there.issuperset(self._needed(batches))

    def refresh(self, batches: range, stop: StopRequest, advance: Callable[[int, int], None]) -> None:
        """Record what batches of training need, and free the memory of what neither they nor later ones need.

        Args:
            batches: the next ones.
            stop: when asked, no further file begins.
            advance: called after each file with the trajectories recorded now, and those to record.
        """
        needed = self._needed(batches)
        for file in [file for file in self._kept if file < needed.start]:
            del self._kept[file]
        missing = [file for file in needed if file not in self._there and not self._find(file)]
        made: dict[int, Rows] = {}

        def record(file: int, first: int, count: int) -> float | None:
            if stop.asked:
                return None
            begin = time.monotonic()
            made[file] = self.recorder.record(self._number(file), first, count)
            return time.monotonic() - begin

        size = self.recorder.batch
        work = [(file, self._number(file) * size, size) for file in missing]
        with self.recorder.distiller.denoiser.role("teacher"):  # once for all threads: the role is the network's
            for (file, _, _), seconds in side_by_side(record, work, self.recorder.accelerator.device):
                if seconds is not None:
                    self._add(file, {name: value.detach().cpu() for name, value in made.pop(file).items()})
                    advance((len(missing) - len(set(missing) - self._there)) * size, len(missing) * size)

    def batch(self, batch: int) -> Trajectory:
        """Return the trajectories of a batch of training, on the device, after :meth:`refresh` recorded them.

        Raises:
            UserError: a file is damaged; it is removed, and a resumed run records it again.
        """
        recorder = self.recorder
        parts = [self._row(*divmod(index, recorder.batch)) for index in self.rounds.indices(batch).tolist()]
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        indices = recorder.distiller.recorded_indices()
        return as_trajectory(rows, indices, recorder.examples, recorder.unconditional, recorder.accelerator.device)

    def prune(self, batch: int) -> None:
        """Remove the files that a run does not need which goes on from a batch of training."""
        oldest = self._needed(range(batch, batch + 1)).start
        for file in range(self._removed, oldest):
            self._path(file).unlink(missing_ok=True)
            self._there.discard(file)
        self._removed = max(self._removed, oldest)

    def _needed(self, batches: range) -> range:
        """Return the files that batches of training, or later ones of their rounds, may need."""
        size = self.recorder.batch
        return range(self.rounds.oldest(batches[0]) // size, -(-self.rounds.made(batches[-1]) // size))

    def _number(self, file: int) -> int:
        """Return the number of one of this process's files among those of all processes."""
        accelerator = self.recorder.accelerator
        number: int = file * accelerator.num_processes + accelerator.process_index
        return number

    def _path(self, file: int) -> Path:
        size = self.recorder.batch
        return self.recorder.store.path_of(self.recorder.keys(self._number(file) * size, size))

    def _find(self, file: int) -> bool:
        """Return True where an earlier session has recorded a file; a damaged one is removed."""
        path = self._path(file)
        if not path.is_file():
            return False
        if damage := check_file(self.recorder.store, path):
            logger.warning("%s is damaged (%s): its trajectories are recorded again", path, damage)
            return False
        self._add(file, self.recorder.store.read(_places(path, range(self.recorder.batch))))
        return True

    def _add(self, file: int, rows: Rows) -> None:
        """Note a file, and keep its rows in memory where there is room."""
        self._there.add(file)
        if _size(rows) + sum(map(_size, self._kept.values())) <= self.memory:
            self._kept[file] = rows

    def _row(self, file: int, row: int) -> Rows:
        """Return one trajectory as name -> (1, ...), from memory or from disk."""
        if file in self._kept:
            return {name: value[row : row + 1] for name, value in self._kept[file].items()}
        if file not in self._there:
            raise UserError(f"trajectory file {file} of this process is not recorded; call refresh first")
        return self.recorder.store.read(_places(self._path(file), range(row, row + 1)))


def frame_of_trajectory(recorder: Recorder) -> Callable[[int], int] | None:
    """Return a function from a process's trajectory to its frame's number; None if all have the same frame."""
    frames, accelerator = recorder.order.frames, recorder.accelerator
    if frames is None or len(frames.unique()) == 1:
        return None
    known: dict[int, int] = {}

    def frame(index: int) -> int:
        file = index // recorder.batch
        if file not in known:  # all of a file have the same one
            number = file * accelerator.num_processes + accelerator.process_index
            known[file] = int(frames[recorder.order.indices(number * recorder.batch, 1)])
        return known[file]

    return frame


def _places(path: Path, rows: range) -> Places:
    return Places(np.zeros(len(rows), np.int32), np.array(rows, np.int32), (path.name,))


def _size(rows: Rows) -> int:
    """Return the bytes of rows."""
    return sum(value.numel() * value.element_size() for value in rows.values())
