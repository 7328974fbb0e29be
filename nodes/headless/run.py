"""One run as the node sees it: begin or find it, follow it, stop it, and give what it has made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ..distil.lora_output import FlashLora
from .following import (
    describe,
    in_minutes,
    is_finished,
    losses_of,
    newest_preview,
    open_preview,
    progress_of,
    seconds_of,
    warnings_of,
)
from .recipe import Request, inputs_named_in
from .runner import FAILED, IN_QUEUE, LOG, LORA, STOPPED, WAITING, ask_to_stop, jobs, publish, read_job, write_job
from .starting import check_packages, queue_lives, queue_log, queue_run, start_queue

LOOK_SECONDS = 0.25  # between two looks at the run
DEAD_LOOKS = 4  # without the lock of the queue, which a living queue lets go of for a moment before it ends
SHOW_AGAIN_SECONDS = 5.0  # a page that was loaded anew shows the run after so long
PREVIEW_SIDE = 1024  # pixels, at most
SHOWN_WARNINGS = 3  # the last ones
PARTS = 1000  # of the progress bar


class HeadlessRun:
    """A run of Flash Distill Headless.

    Args:
        request: what to distil.
        runs: the folder of all runs.
        tell: shows a text on the node.
        plot: shows losses on the node.
    """

    def __init__(
        self, request: Request, runs: Path, tell: Callable[[str], None], plot: Callable[[list[float]], None]
    ) -> None:
        self.request = request
        self.runs = runs
        self.folder = request.folder(runs)
        self.tell = tell
        self.plot = plot

    def is_finished(self) -> bool:
        """Return whether the run is done."""
        return is_finished(self.folder)

    def begin(self, unload_models: bool) -> None:
        """Queue the run; where it is in the queue already, change nothing.

        Raises:
            ValueError: the trainer's packages are missing.
            InterruptProcessingException: ComfyUI's.
        """
        job = read_job(self.folder)
        if job is None or job.state not in IN_QUEUE or not queue_lives(self.runs):
            check_packages()
            self.request.write(self.folder)
            if unload_models:
                comfy.model_management.unload_all_models()
                comfy.model_management.soft_empty_cache()
        while not queue_run(self.folder, self.request.name):
            self.tell(describe(self.folder, True))
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(LOOK_SECONDS)

    def follow(self) -> None:
        """Show progress, previews and losses until the run ends.

        Raises:
            ValueError: the run failed or was stopped.
            InterruptProcessingException: ComfyUI's; the run was asked to stop.
        """
        face, dead = Face(self.folder, self.tell, self.plot), 0
        try:
            while True:
                alive = queue_lives(self.runs)  # before the job: a queue that is not alive writes no more
                dead = 0 if alive else dead + 1
                job = read_job(self.folder)
                face.show(describe(self.folder, alive))
                if job is None or job.state not in IN_QUEUE:
                    break
                if dead > DEAD_LOOKS:
                    raise ValueError(
                        f"The process of the queue has ended: {queue_log(self.runs)}. Queue again: the run goes on "
                        f"from its last checkpoint. Its folder: {self.folder}"
                    )
                comfy.model_management.throw_exception_if_processing_interrupted()
                time.sleep(LOOK_SECONDS)
        except comfy.model_management.InterruptProcessingException:
            self.stop()
            raise
        if job is not None and job.state == FAILED:
            lines = [job.reason, inputs_named_in(job.reason), f"The trainer's whole output: {self.folder / LOG}"]
            raise ValueError("\n".join(line for line in lines if line))
        if job is None or job.state == STOPPED:
            raise ValueError(f"{describe(self.folder, alive)}. Queue again to go on. Its folder: {self.folder}")

    def stop(self) -> None:
        """Ask the run to stop with a checkpoint; where it is not in the queue, do nothing."""
        job = read_job(self.folder)
        if job is None or job.state not in IN_QUEUE:
            return
        ask_to_stop(self.folder)
        if job.state == WAITING:
            write_job(self.folder, replace(job, state=STOPPED, reason="it was taken out of the queue"))
            return
        if not queue_lives(self.runs):  # the queue was killed; its trainer may still be at work
            start_queue(self.runs)
        self.tell("stopping: the trainer ends its update and saves a checkpoint. Queue again to go on.")

    def losses(self) -> list[float]:
        """Return the losses so far, one for each line of the log."""
        return losses_of(self.folder)

    def outputs(self) -> tuple[Any, ...]:
        """Return LoRA, preview, text and losses; of an unfinished run what there is, and blockers for the rest."""
        nothing = ExecutionBlocker(None)
        lora: Any = nothing
        if self.is_finished():
            self._publish()
            lora = FlashLora.of_file(self.folder / LORA, self.request.name)
        picture = newest_preview(self.folder)
        preview: Any = nothing
        if picture is not None:
            pixels = np.asarray(open_preview(picture), dtype=np.float32) / 255
            preview = torch.from_numpy(pixels)[None]
        losses = self.losses()
        text = self.text(losses)
        self.tell(text)
        return lora, preview, text, {"loss": losses} if losses else nothing

    def _publish(self) -> None:
        """Copy the LoRA into ``models/loras`` again where it is no more, and let ComfyUI read its lists again."""
        job = read_job(self.folder)
        loras = Path(folder_paths.get_folder_paths("loras")[0])
        if job is not None and not (job.saved and (loras / job.saved).is_file()):
            write_job(self.folder, publish(self.folder, job, loras))
        folder_paths.filename_list_cache.pop("loras", None)

    def text(self, losses: list[float]) -> str:
        """Return the state of the run, its figures, and the other runs of the queue."""
        alive = queue_lives(self.runs)
        lines = [f"{self.request.name}: {describe(self.folder, alive)}"]
        if losses:
            lines.append(f"loss: {losses[0]:.4g} -> {losses[-1]:.4g} (first and last line of the log)")
        lines += [f"warning: {sentence}" for sentence in warnings_of(self.folder)[-SHOWN_WARNINGS:]]
        if seconds := seconds_of(self.folder):
            lines.append(f"time: {in_minutes(seconds)}")
        lines.append(f"folder: {self.folder}")
        others = [folder for folder, job in jobs(self.runs).items() if job.state in IN_QUEUE and folder != self.folder]
        if others:
            lines += ["", "In the queue beside it:", *(f"{other.name}: {describe(other, alive)}" for other in others)]
        return "\n".join(lines)


class Face:
    """What the node shows while its run goes on: a progress bar, a text, the losses and the last preview."""

    def __init__(self, folder: Path, tell: Callable[[str], None], plot: Callable[[list[float]], None]) -> None:
        self.folder = folder
        self.tell = tell
        self.plot = plot
        self.bar = comfy.utils.ProgressBar(PARTS)
        self._shown: tuple[str, Path | None] = ("", None)
        self._when = 0.0

    def show(self, text: str) -> None:
        """Show where the run is, where something has changed or the last time is some seconds ago."""
        picture = newest_preview(self.folder)
        old = time.monotonic() - self._when > SHOW_AGAIN_SECONDS
        if not old and self._shown == (text, picture):
            return
        progress = progress_of(self.folder)
        drawn = None
        if picture is not None and (old or picture != self._shown[1]):
            drawn = ("JPEG", open_preview(picture), PREVIEW_SIDE)
        self._shown, self._when = (text, picture), time.monotonic()
        self.bar.update_absolute(round(PARTS * progress.share) if progress else 0, PARTS, drawn)
        self.tell(text)
        self.plot(losses_of(self.folder))
