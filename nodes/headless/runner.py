"""The queue of headless distillations: a process that starts the trainer for one run after another.

It lives on when ComfyUI ends, so a restarted ComfyUI finds its runs going on. ComfyUI starts this file by its path:

    python runner.py RUNS TRAINER LORAS

RUNS is the folder of all runs, TRAINER the trainer's ``__main__.py``, LORAS the folder that finished LoRAs are copied
to. Only the standard library and filelock are needed. The same file, imported by the nodes, reads and writes what a run
and the queue tell each other: ``job.json`` in the folder of each run, and a file ``stop`` as the request to stop.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"
IN_QUEUE = (WAITING, RUNNING)

# Files in the folder of a run, beside those that the trainer writes there.
JOB, STOP, RECIPE, LOG = "job.json", "stop", "recipe.yaml", "trainer.log"
# Files that the trainer writes there.
LORA, PROGRESS, TRAINER_LOCK, TRAINER_OWNER = "lora.safetensors", "progress.json", ".lock", ".lock-owner.json"
QUEUE_LOCK = ".queue.lock"  # in the folder of all runs, held by the process of the queue

LOOK_SECONDS = 0.25  # between two looks at the trainer and at the request to stop
ATTEMPTS, ATTEMPT_SECONDS = 20, 0.05  # at a file that another process reads or replaces
LOCK_SECONDS = 5.0  # for the lock of the queue, which a node may hold for a moment to see whether it is free
# The trainer's codes for a run that a signal stopped, and Python's codes where the signal ended it before it listened.
STOPPED_CODES = {128 + 2, 128 + 15, 128 + 21, -2, -15}
SUFFIX = ".safetensors"
SESSION = "=== the trainer starts: "  # begins the line before each session in a run's LOG


@dataclass(frozen=True)
class Job:
    """What is known of a run.

    Attributes:
        state: WAITING, RUNNING, DONE, STOPPED or FAILED.
        queued: when it was queued, in seconds since 1970: the order of the queue.
        lora: the name of its LoRA below the folder of LoRAs, without ending, with ``/`` between folders.
        saved: the name of the LoRA's file there once it is copied, with its ending.
        reason: why it failed or stopped, in a sentence.
    """

    state: str
    queued: float
    lora: str
    saved: str = ""
    reason: str = ""


def read_job(folder: Path) -> Job | None:
    """Return what is known of a run, None where the folder holds no run."""
    for _ in range(ATTEMPTS):
        try:
            return Job(**json.loads((folder / JOB).read_text(encoding="utf-8")))
        except PermissionError:  # Windows, while another process replaces the file
            time.sleep(ATTEMPT_SECONDS)
        except (OSError, ValueError, TypeError):
            break
    return None


def write_job(folder: Path, job: Job) -> None:
    """Replace what is known of a run, whole or not at all."""
    partial = folder / f".{JOB}.{os.getpid()}.partial"
    partial.write_text(json.dumps(asdict(job), indent=2) + "\n", encoding="utf-8")
    _replace(partial, folder / JOB)


def _replace(partial: Path, path: Path) -> None:
    """Rename ``partial``. Windows refuses while another process reads ``path``, so try again for a moment."""
    for _ in range(ATTEMPTS):
        with suppress(PermissionError):
            return os.replace(partial, path)
        time.sleep(ATTEMPT_SECONDS)
    return os.replace(partial, path)


def jobs(runs: Path) -> dict[Path, Job]:
    """Return all runs by their folders, in the order in which they were queued."""
    folders = sorted(path.parent for path in runs.glob(f"*/{JOB}"))
    found = {folder: job for folder in folders if (job := read_job(folder)) is not None}
    return dict(sorted(found.items(), key=lambda item: item[1].queued))


def is_held(lock: Path) -> bool:
    """Return whether a living process holds a lock. The system releases the lock of a process that has ended."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def ask_to_stop(folder: Path) -> None:
    """Ask the queue to stop a run, or to leave it out where it still waits."""
    (folder / STOP).touch()


def publish(folder: Path, job: Job, loras: Path) -> Job:
    """Copy a finished run's LoRA into the folder of LoRAs; return the job with the name that the LoRA has there.

    A file of that name that is another LoRA stays: the new one gets a number, as in core's Save nodes.

    Raises:
        ValueError: the job's name leads out of the folder.
    """
    name = PurePosixPath(job.lora)
    target = loras.joinpath(*name.parts[:-1])
    inside = (target / name.name).resolve().is_relative_to(loras.resolve())
    if not name.parts or name.is_absolute() or ".." in name.parts or not inside:
        raise ValueError(f"{folder / JOB}: the LoRA's name {job.lora!r} leads out of {loras}; choose another name")
    content = (folder / LORA).read_bytes()
    path, number = target / f"{name.name}{SUFFIX}", 0
    while path.exists() and path.read_bytes() != content:
        number += 1
        path = target / f"{name.name}_{number:05}_{SUFFIX}"
    if not path.exists():
        target.mkdir(parents=True, exist_ok=True)
        partial = target / f".{path.name}.partial"
        shutil.copyfile(folder / LORA, partial)
        _replace(partial, path)
    return replace(job, saved=path.relative_to(loras).as_posix())


def last_words(text: str) -> str:
    """Return the error at the end of the last session of a log: a sentence, or the last line of a traceback."""
    lines = [line.rstrip() for line in text.rpartition(SESSION)[2].splitlines() if line.strip()]
    lines = lines[SESSION in text :]  # the rest of the session's first line is the time
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith("flash-diffusion: "):
            return "\n".join([lines[number].removeprefix("flash-diffusion: "), *lines[number + 1 :]])
    return lines[-1] if lines else "it printed nothing"


class Queue:
    """The process of the queue.

    Args:
        runs: the folder of all runs.
        trainer: the trainer's ``__main__.py``.
        loras: where finished LoRAs go.
    """

    def __init__(self, runs: Path, trainer: Path, loras: Path) -> None:
        self.runs = runs
        self.trainer = trainer
        self.loras = loras
        self.ending = False

    def end(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: stop the present run with a checkpoint, and begin no other."""
        self.ending = True

    def work(self) -> None:
        """Run all waiting runs. Return where none waits, or another process has the queue."""
        from filelock import FileLock, Timeout

        while True:
            try:
                with FileLock(self.runs / QUEUE_LOCK, timeout=LOCK_SECONDS):
                    self._settle()
                    while not self.ending and (folder := self._next()) is not None:
                        self._run(folder)
            except Timeout:
                return
            # A run that was queued while this process let go of the lock has found the lock held.
            if self.ending or self._next() is None:
                return

    def _next(self) -> Path | None:
        """Return the run that has waited longest."""
        return next((folder for folder, job in jobs(self.runs).items() if job.state == WAITING), None)

    def _settle(self) -> None:
        """Bring runs to an end whose queue was killed: their trainer may still be at work, and is then waited for."""
        for folder, job in jobs(self.runs).items():
            if job.state != RUNNING:
                continue
            self._wait_for_trainer(folder)
            done = (folder / LORA).is_file()
            self._close(folder, job, DONE if done else STOPPED, "" if done else "its process has ended without a word")

    def _wait_for_trainer(self, folder: Path) -> None:
        """Wait until no trainer of an earlier queue works in a run's folder; stop the trainer where that is asked."""
        while is_held(folder / TRAINER_LOCK):
            if self._asked(folder):
                _end_owner(folder)
            time.sleep(LOOK_SECONDS)

    def _asked(self, folder: Path) -> bool:
        return self.ending or (folder / STOP).exists()

    def _run(self, folder: Path) -> None:
        """Let the trainer make one run, and keep how it ended."""
        job = read_job(folder)
        if job is None:
            return
        if (folder / STOP).exists():
            self._close(folder, job, STOPPED, "it was stopped before it began")
            return
        write_job(folder, replace(job, state=RUNNING))
        self._wait_for_trainer(folder)
        with suppress(OSError):  # Windows, while a node reads it
            (folder / PROGRESS).unlink()  # it is of the session before
        code, asked = self._train(folder)
        words = last_words((folder / LOG).read_text(encoding="utf-8", errors="replace"))
        if code == 0:
            self._close(folder, job, DONE, "")
        elif asked or code in STOPPED_CODES:
            self._close(folder, job, STOPPED, "it was stopped")
        elif code < 0:
            ended = f"signal {-code} ended its process, perhaps because the memory was full"
            self._close(folder, job, FAILED, ended)
        else:
            self._close(folder, job, FAILED, words)

    def _train(self, folder: Path) -> tuple[int, bool]:
        """Run the trainer; return its exit code, and whether it was asked to stop."""
        command = [sys.executable, str(self.trainer), "distill", str(folder / RECIPE), "--output", str(folder)]
        asked = False
        with (folder / LOG).open("ab") as output:
            output.write(f"{SESSION}{datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [*command, "--resume"], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **_group()
            )
            while process.poll() is None:
                if not asked and self._asked(folder):
                    asked = True
                    _interrupt(process)
                time.sleep(LOOK_SECONDS)
        return process.returncode, asked

    def _close(self, folder: Path, job: Job, state: str, reason: str) -> None:
        """Keep how a run ended, and copy the LoRA of a finished one."""
        job = replace(job, state=state, reason=reason)
        if state == DONE:
            try:
                job = publish(folder, job, self.loras)
            except (OSError, ValueError) as error:
                job = replace(job, state=FAILED, reason=f"{folder / LORA} could not be copied to {self.loras}: {error}")
        write_job(folder, job)
        (folder / STOP).unlink(missing_ok=True)  # last: a node takes a run that is asked to stop for one that goes on


def _group() -> dict[str, Any]:
    """Return Popen's arguments for a process that :func:`_interrupt` can reach."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {}


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ask a trainer to stop with a checkpoint."""
    if sys.platform == "win32":
        process.send_signal(signal.CTRL_BREAK_EVENT)  # the only signal there that a process can handle
    else:
        process.terminate()


def _end_owner(folder: Path) -> None:
    """Ask the process that holds a run's lock to stop. Windows has no signal for a process that is no child."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        owner = json.loads((folder / TRAINER_OWNER).read_text(encoding="utf-8"))
        if sys.platform != "win32":
            os.kill(int(owner["pid"]), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """Work through the queue; see the top of this file."""
    runs, trainer, loras = (Path(argument) for argument in arguments)
    queue = Queue(runs, trainer, loras)
    handler: Callable[[int, FrameType | None], None] = queue.end
    for name in ("SIGTERM", "SIGINT", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)
    queue.work()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
