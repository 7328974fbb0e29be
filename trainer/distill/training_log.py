"""The log of a run: one progress bar over the whole run, lines of `log.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..files import write_text_whole, writing
from ..progress import in_words

logger = logging.getLogger(__name__)

DISCRIMINATOR_ACCURACY = "discriminator_accuracy"
WINDOW = 100  # updates between two looks at the discriminator's accuracy
BLIND = 0.55  # accuracy up to here counts as chance: at 400 pairs, two standard deviations of guesses
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


class BlindDiscriminator:
    """Notices discriminator heads that do not learn to tell real from fake: their gradient is noise for the student."""

    def __init__(self) -> None:
        self._right = 0.0
        self._updates = 0

    def warning(self, terms: Mapping[str, float], updates: int) -> str:
        """Return a warning after each ``WINDOW`` updates in which the heads were at chance, else an empty text.

        Args:
            terms: the means of the last ``updates`` updates.
        """
        if DISCRIMINATOR_ACCURACY not in terms:
            return ""
        self._right += terms[DISCRIMINATOR_ACCURACY] * updates
        self._updates += updates
        if self._updates < WINDOW:
            return ""
        share, count = self._right / self._updates, self._updates
        self._right, self._updates = 0.0, 0
        if share > BLIND:
            return ""
        return (
            f"the discriminator tells real from fake in {share:.0%} of the pairs of the last {count} updates (chance: "
            "50 %), so the adversarial loss gives the student noise. Give method.adversarial_timesteps lower levels, "
            "raise method.discriminator.warmup or optimizer.discriminator_lr, or set the phases' adversarial to 0"
        )


class TrainingLog:
    """Writes the log of a run. Only the main process writes and prints.

    Args:
        output: the run's folder.
        update: where the run continues; later lines of an earlier session are dropped.
        active: True in the main process.
    """

    def __init__(self, output: Path, update: int, active: bool) -> None:
        self.active = active
        self.console = Console(stderr=True)
        self.path = output / "log.jsonl"
        self._shown = time.monotonic()
        self.curves = output / "tensorboard"
        if active:
            self._cut(update)
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

    def _cut(self, update: int) -> None:
        """Drop the lines of updates that this session makes again, because the last one was killed."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["update"] <= update:
                    kept.append(line)
            except (ValueError, KeyError):
                logger.warning("%s: dropped a broken line, the trace of a killed session", self.path)
        write_text_whole(self.path, "".join(f"{line}\n" for line in kept))

    def record(self, facts: Mapping[str, Any], terms: Mapping[str, float]) -> None:
        """Write one line of the log, and a point of each curve in TensorBoard."""
        if not self.active:
            return
        line = json.dumps({**facts, **{name: float(f"{value:.6g}") for name, value in terms.items()}})
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        with writing(self.curves):
            for name, value in terms.items():
                self.board.add_scalar(name, value, facts["update"])

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
        """Move the bar; where the output is no terminal, print a line every few seconds instead.

        Args:
            share: of the whole run, in 0..1.
            left: seconds, None where unknown.
            note: what was done last.
        """
        self.progress.update(self._bar, completed=share, left=in_words(left), note=note)
        now = time.monotonic()
        if self.active and not self.console.is_terminal and now - self._shown > QUIET_INTERVAL:
            self._shown = now
            self.console.print(f"{share:.0%}, {in_words(left)} left: {note}", highlight=False, soft_wrap=True)

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
