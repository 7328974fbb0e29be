"""Queue a run, and start the process of the queue where none is at work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths

from . import runner
from .runner import IN_QUEUE, QUEUE_LOCK, STOP, WAITING, Job, is_held, read_job, write_job

RUNS = "flash_distill_headless"  # the folder of all runs in ComfyUI's output folder
PYTHON = "FLASH_DIFFUSION_PYTHON"  # environment variable: the Python that runs the trainer
TRAINER = Path(__file__).resolve().parents[2] / "trainer" / "__main__.py"
QUEUE_LOG = "queue.log"

_started: subprocess.Popen[bytes] | None = None


def runs_folder() -> Path:
    """Return the folder of all runs, made where it is missing.

    Raises:
        ValueError: a link leads out of ComfyUI's output folder.
    """
    output = Path(folder_paths.get_output_directory())
    runs = output / RUNS
    runs.mkdir(parents=True, exist_ok=True)
    if not runs.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"{runs} is a link that leads out of {output}. Replace it by a folder.")
    return runs


def python() -> str:
    """Return the Python that runs the trainer: ComfyUI's own, or the one that the environment names.

    No input of the node chooses it: a workflow from a stranger must not name a program.
    """
    return os.environ.get(PYTHON) or sys.executable


def check_packages() -> None:
    """Raise ValueError with pip's command where the Python lacks packages of the trainer."""
    program = python()
    try:
        done = subprocess.run(
            [program, str(TRAINER), "needs"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    except OSError as error:
        raise ValueError(
            f"{program} cannot be started: {error.strerror}. Set the environment variable {PYTHON} to the Python of "
            "the trainer's environment, or remove it to take ComfyUI's."
        ) from error
    if done.returncode:
        said = runner.last_words(done.stderr)
        raise ValueError(f"{said}\nOr set the environment variable {PYTHON} to a Python that has them.")


def queue_run(folder: Path, lora: str) -> bool:
    """Put a run into the queue, or leave it where it is.

    Args:
        lora: the name of its LoRA below the folder of LoRAs.

    Returns:
        False where the run is just being stopped: try again in a moment.
    """
    job = read_job(folder)
    alive = queue_lives(folder.parent)
    if job is not None and job.state in IN_QUEUE and alive:
        return not (folder / STOP).exists()
    (folder / STOP).unlink(missing_ok=True)
    new = Job(WAITING, time.time(), lora)
    write_job(folder, new if job is None else replace(new, saved=job.saved))
    # The lock decides, and only now: the queue looks for runs once more after it lets go of the lock, but a process
    # without the lock may be about to end, and would never see this run. A second process ends by itself.
    if not is_held(folder.parent / QUEUE_LOCK):
        start_queue(folder.parent)
    return True


def queue_lives(runs: Path) -> bool:
    """Return whether the process of the queue is at work, or about to be."""
    return (_started is not None and _started.poll() is None) or is_held(runs / QUEUE_LOCK)


def start_queue(runs: Path) -> None:
    """Start the process of the queue, which ends when no run waits. It does not end with ComfyUI."""
    global _started
    loras = folder_paths.get_folder_paths("loras")[0]
    arguments = [python(), str(Path(runner.__file__).resolve()), str(runs), str(TRAINER), loras]
    with (runs / QUEUE_LOG).open("wb") as log:
        _started = subprocess.Popen(arguments, cwd=runs, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **detached())


def detached() -> dict[str, Any]:
    """Return Popen's arguments for a process that neither Ctrl-C in ComfyUI's terminal nor ComfyUI's end reaches."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def queue_log(runs: Path) -> str:
    """Return the last words of the process of the queue."""
    path = runs / QUEUE_LOG
    return runner.last_words(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""
