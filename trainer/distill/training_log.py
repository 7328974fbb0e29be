"""The log of a run: one progress bar over the whole run, lines of `log.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..files import partial_path, write_text_whole, writing
from ..health.lines import read_lines
from ..progress import in_words

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"  # where the run is now, for programs that follow it
TOLD_INTERVAL = 0.5  # seconds between two versions of it
QUIET_INTERVAL = 20.0  # seconds between lines where the output is no terminal and a bar can't be drawn


class Means:
    """Running means of scalars that stay on their device, so that a training step waits for nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one value to each mean."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def share(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their means over the processes.

        Args:
            mean: returns the mean of a tensor over the processes.
        """
        if self._sums:
            shared = mean(torch.stack([value.float() for value in self._sums.values()]))
            self._sums = dict(zip(self._sums, shared.unbind(), strict=True))

    def take(self) -> dict[str, float]:
        """Return the means since the last call. Waits for the device once."""
        if not self._sums:
            return {}
        values = torch.stack([self._sums[name] / count for name, count in self._counts.items()]).tolist()
        means = dict(zip(self._counts, values, strict=True))
        self._sums, self._counts = {}, {}
        return means

    def state(self) -> dict[str, Tensor]:
        """Return the sums and counts since the last line of the log, for a checkpoint."""
        sums = {f"sum/{name}": value for name, value in self._sums.items()}
        return sums | {f"count/{name}": torch.tensor(count) for name, count in self._counts.items()}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Set what :meth:`state` returned, so that the next line of the log is that of a run without a stop."""
        parts = {tuple(key.split("/", 1)): value for key, value in state.items()}
        self._sums = {name: value.to(device) for (kind, name), value in parts.items() if kind == "sum"}
        self._counts = {name: int(value) for (kind, name), value in parts.items() if kind == "count"}


class TrainingLog:
    """Writes the log of a run. Only the main process writes and prints.

    Args:
        output: the run's folder.
        update: where the run continues; later lines of an earlier session are dropped.
        active: True in the main process.

    Attributes:
        kept: the entries of earlier sessions.
    """

    def __init__(self, output: Path, update: int, active: bool) -> None:
        self.active = active
        self.console = Console(stderr=True)
        self.path = output / "log.jsonl"
        self.kept: list[dict[str, Any]] = []
        self._shown = self._told = time.monotonic()
        self.curves = output / "tensorboard"
        if active:
            self.kept = self._cut(update)
            threading.excepthook = _without_tensorboard(threading.excepthook)
            with writing(self.curves):
                # TensorBoard hides the points from `purge_step` on: those of updates that are made again.
                self.board: SummaryWriter = SummaryWriter(str(self.curves), purge_step=update + 1)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not active or not self.console.is_terminal,
        )
        self._bar = self.progress.add_task("distil", total=1.0, left="?", note="")

    def _cut(self, update: int) -> list[dict[str, Any]]:
        """Drop the lines of updates that this session makes again after a kill; return the entries of the others."""
        if not self.path.is_file():
            return []
        kept, entries = [], []
        for line, entry in read_lines(self.path):
            if entry is None:
                logger.warning("%s: dropped a broken line, the trace of a killed session", self.path)
            elif entry["update"] <= update:
                kept.append(line)
                entries.append(entry)
        write_text_whole(self.path, "".join(f"{line}\n" for line in kept))
        return entries

    def record(
        self, facts: Mapping[str, Any], figures: Mapping[str, float], health: Mapping[str, Sequence[str]]
    ) -> None:
        """Write one line of the log, and a point of each curve in TensorBoard.

        Args:
            health: sentences on the run's health that this line has brought.
        """
        if not self.active:
            return
        line = json.dumps({**facts, **{name: float(f"{value:.6g}") for name, value in figures.items()}, **health})
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        with writing(self.curves):
            for name, value in figures.items():
                self.board.add_scalar(name, value, facts["update"])
            for kind, sentences in health.items():
                self.board.add_text(f"health/{kind}", "\n\n".join(sentences), facts["update"])

    def picture(self, grid: Image.Image, update: int) -> None:
        """Show a sample grid in TensorBoard."""
        if self.active:
            with writing(self.curves):
                self.board.add_image("preview", np.asarray(grid), update, dataformats="HWC")

    def flush(self) -> None:
        """Write TensorBoard's points to disk: a checkpoint must not be ahead of them."""
        if self.active:
            with writing(self.curves):
                self.board.flush()

    def show(self, share: float, left: float | None, note: str) -> None:
        """Move the bar and write ``progress.json``; where the output is no terminal, print a line now and then.

        Args:
            share: of the whole run, in 0..1.
            left: seconds, None where unknown.
            note: what was done last.
        """
        self.progress.update(self._bar, completed=share, left=in_words(left), note=note)
        now = time.monotonic()
        if self.active and (share >= 1 or now - self._told > TOLD_INTERVAL):
            self._told = now
            self._tell({"share": round(share, 4), "left": left, "note": note})
        if self.active and not self.console.is_terminal and now - self._shown > QUIET_INTERVAL:
            self._shown = now
            self.console.print(f"{share:.0%}, {in_words(left)} left: {note}", highlight=False, soft_wrap=True)

    def _tell(self, progress: Mapping[str, Any]) -> None:
        """Replace ``progress.json``. A failure is no harm: a full disk is found by those who write what lasts."""
        path = self.path.with_name(PROGRESS)
        with suppress(OSError):
            partial_path(path).write_text(json.dumps(progress), encoding="utf-8")
            os.replace(partial_path(path), path)

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self.active:
            with writing(self.curves):
                self.board.flush()
                self.board.close()


def _without_tensorboard(print_error: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a hook that prints no traceback of TensorBoard's thread: the next write or flush raises its error."""

    def hook(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            print_error(arguments)

    return hook
