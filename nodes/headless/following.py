"""What a run tells from outside: its place in the queue, how far it is, its losses and its previews."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..distil.training.state import runs_in
from ..shared.schema import count
from .runner import (
    DONE,
    IN_QUEUE,
    LOG,
    LORA,
    PROGRESS,
    RUNNING,
    STOP,
    TRAINER_LOCK,
    WAITING,
    Job,
    is_held,
    jobs,
    last_words,
    read_job,
)

LOSSES, PREVIEWS = "log.jsonl", "previews"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        share: of the whole run, 0..1.
        left: seconds; None where unknown.
        note: what was done last.
    """

    share: float
    left: float | None
    note: str


def progress_of(folder: Path) -> Progress | None:
    """Return how far the trainer is, None before it has begun."""
    try:
        facts = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        return Progress(float(facts["share"]), facts["left"], str(facts["note"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def losses_of(folder: Path) -> list[float]:
    """Return the distillation loss (DMD's, where a preset has no other) of each line of the run's log."""
    found = []
    for entry in _entries(folder):
        value = entry.get("distillation", entry.get("dmd"))
        if isinstance(value, int | float):
            found.append(float(value))
    return found


def seconds_of(folder: Path) -> float:
    """Return the seconds of a run over all sessions, 0 before the first line of its log."""
    return max((float(entry["seconds"]) for entry in _entries(folder) if "seconds" in entry), default=0.0)


def warnings_of(folder: Path) -> list[str]:
    """Return what the trainer's rules found wrong with a run's health, in sentences."""
    return [str(sentence) for entry in _entries(folder) for sentence in entry.get("warnings", ())]


def _entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOSSES
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the trainer is just writing it
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def newest_preview(folder: Path) -> Path | None:
    """Return the picture of the last preview, None before the first."""
    return max((folder / PREVIEWS).glob("*.webp"), default=None)


def open_preview(path: Path) -> Image.Image:
    """Return a preview as an RGB picture."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def describe(folder: Path, alive: bool) -> str:
    """Return the state of a run in a line or two.

    Args:
        alive: whether the process of the queue is at work.
    """
    job = read_job(folder)
    if job is None:
        return "not begun"
    if job.state in IN_QUEUE and not alive:
        return f"{_so_far(folder)}its process has ended; queue it again to go on"
    if job.state in IN_QUEUE and (folder / STOP).exists():
        return f"{_so_far(folder)}stopping: the trainer ends its update and saves a checkpoint"
    if job.state == WAITING:
        before = [other for other, its in jobs(folder.parent).items() if its.state in IN_QUEUE]
        number = before.index(folder) if folder in before else 0
        return f"waiting: {count(number, 'run')} before it" if number else "waiting: it begins in a moment"
    if job.state == RUNNING:
        return f"{_so_far(folder)}{_now(folder)}"
    if job.state == DONE:
        return f"done: models/loras/{job.saved}"
    return f"{_so_far(folder)}{job.state}: {job.reason}"


def _so_far(folder: Path) -> str:
    progress = progress_of(folder)
    return "" if progress is None else f"{progress.share:.0%}, "


def _now(folder: Path) -> str:
    """Return what a running trainer does: its note with the time left, or what it printed last."""
    progress = progress_of(folder)
    if progress is not None:
        left = "" if progress.left is None else f"{in_minutes(progress.left)} left: "
        return f"{left}{progress.note.replace('  ', ', ')}"  # the bar of a terminal parts them by two spaces
    log = folder / LOG
    printed = last_words(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else ""
    return printed or "the trainer starts"


def in_minutes(seconds: float) -> str:
    """Return "1:05" for 65 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def table(runs: Path, in_graph: Path, alive: bool) -> str:
    """Return all runs with their states and sizes on disk, one a line.

    Args:
        runs: the folder of headless runs, which come first, in the order in which they were queued.
        in_graph: the folder of Flash Distill's runs.
        alive: whether the process of the queue is at work.
    """
    found: dict[Path, Job] = jobs(runs)
    lines = [f"{folder.name}: {describe(folder, alive)} ({_on_disk(folder)})" for folder in found]
    beside = [f"{folder.name}: {state} ({_on_disk(folder)})" for folder, state in runs_in(in_graph).items()]
    if beside:
        lines += [*([""] if lines else []), "Flash Distill:", *beside]
    return "\n".join(lines) or f"There is no run in {runs} or {in_graph}. Flash Distill begins one."


def remove(name: str, runs: Path, in_graph: Path, alive: bool) -> str:
    """Delete a run's folder, and return what was freed. Its LoRA in ``models/loras`` stays.

    Args:
        name: of the folder, as :func:`table` lists it.

    Raises:
        ValueError: there is no such run, or the run waits or is at work.
    """
    found = {folder.name: folder for folder in (*runs_in(in_graph), *jobs(runs))}
    folder = found.get(name)
    if folder is None or folder.is_symlink():
        raise ValueError(f"There is no run {name!r}. Copy the name from the list: {', '.join(found) or 'it is empty'}.")
    job = read_job(folder)
    if job is not None and job.state in IN_QUEUE and alive:
        raise ValueError(f"{name} is in the queue: {describe(folder, alive)}. Stop it first: action 'stop'.")
    if job is not None and is_held(folder / TRAINER_LOCK):  # the trainer of a queue that was killed
        raise ValueError(f"A trainer is still at work in {folder}. Wait until it ends, or end its process.")
    freed = _on_disk(folder)
    shutil.rmtree(folder)
    return f"{name} is removed: {freed} are free"


def _on_disk(folder: Path) -> str:
    """Return the size of a folder's files: "12.3 MB"."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def is_finished(folder: Path) -> bool:
    """Return whether a run is done and its LoRA is there."""
    job = read_job(folder)
    return job is not None and job.state == DONE and (folder / LORA).is_file()
