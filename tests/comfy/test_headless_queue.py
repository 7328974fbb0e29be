"""The queue of headless runs, with a stand-in for the trainer: order, every kind of end, a kill, the LoRA's copy."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from .runtime import ROOT

FILE = ROOT / "nodes" / "headless" / "runner.py"
# Does what its recipe says, and holds the lock of the run's folder as the trainer does.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from filelock import FileLock

output = Path(sys.argv[sys.argv.index("--output") + 1])
order = (output / "recipe.yaml").read_text()
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
with FileLock(output / ".lock", timeout=0):
    (output / ".lock-owner.json").write_text(json.dumps({"pid": os.getpid()}))
    with (output.parent / "order").open("a") as file:
        file.write(output.name + "\\n")
    while order == "wait" and not asked:
        time.sleep(0.02)
    if order == "refuse":
        sys.stderr.write("loading\\nflash-diffusion: model.path: is no model;\\nchoose another\\n")
        sys.exit(2)
    if order == "crash":
        raise RuntimeError("of a library")
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if asked:
        sys.exit(143)
    (output / "lora.safetensors").write_text(output.name)
"""


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """Import the file: the room around it needs ComfyUI."""
    spec = importlib.util.spec_from_file_location("headless_runner", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Desk:
    """A folder of runs, and the queue's process over it."""

    def __init__(self, runner: ModuleType, folder: Path) -> None:
        self.runner = runner
        self.runs, self.loras, self.trainer = folder / "runs", folder / "loras", folder / "trainer.py"
        self.runs.mkdir()
        self.loras.mkdir()
        self.trainer.write_text(TRAINER)
        self.queued = 0.0

    def queue(self, name: str, order: str, lora: str = "") -> Path:
        folder = self.runs / name
        folder.mkdir()
        (folder / "recipe.yaml").write_text(order)
        self.queued += 1
        self.runner.write_job(folder, self.runner.Job("waiting", self.queued, lora or name))
        return folder

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, FILE, self.runs, self.trainer, self.loras])

    def work(self) -> None:
        assert self.start().wait() == 0

    def states(self) -> dict[str, str]:
        return {folder.name: job.state for folder, job in self.runner.jobs(self.runs).items()}

    def order(self) -> list[str]:
        path = self.runs / "order"
        return path.read_text().split() if path.is_file() else []


@pytest.fixture
def desk(runner: ModuleType, tmp_path: Path) -> Desk:
    """Make an empty queue."""
    return Desk(runner, tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not condition():
        time.sleep(0.02)


def test_runs_go_one_after_another_and_keep_how_they_ended(desk: Desk, runner: ModuleType) -> None:
    orders = {"z-first": "learn", "refused": "refuse", "crashed": "crash", "killed": "die", "a-last": "learn"}
    folders = [desk.queue(name, order) for name, order in orders.items()]
    unwanted = desk.queue("unwanted", "learn")
    runner.ask_to_stop(unwanted)
    desk.work()
    assert desk.order() == [folder.name for folder in folders]
    first, refused, crashed, killed, last = (runner.read_job(folder) for folder in folders)
    assert (first.state, first.saved) == (last.state, "z-first.safetensors") == ("done", "z-first.safetensors")
    assert (desk.loras / "a-last.safetensors").read_text() == "a-last"
    assert (refused.state, refused.reason) == ("failed", "model.path: is no model;\nchoose another")
    assert (crashed.state, crashed.reason) == ("failed", "RuntimeError: of a library")
    assert killed.state == "failed"
    assert "signal 9 ended its process" in killed.reason
    assert runner.read_job(unwanted).state == "stopped"
    assert not (unwanted / "stop").exists()


def test_a_request_stops_the_trainer_and_the_next_run_begins(desk: Desk, runner: ModuleType) -> None:
    long = desk.queue("long", "wait")
    desk.queue("next", "learn")
    process = desk.start()
    wait_for(lambda: desk.order() == ["long"])
    assert desk.states() == {"long": "running", "next": "waiting"}
    assert runner.is_held(desk.runs / ".queue.lock")
    runner.ask_to_stop(long)
    assert process.wait() == 0
    assert desk.states() == {"long": "stopped", "next": "done"}
    assert not (long / "stop").exists()
    assert not runner.is_held(desk.runs / ".queue.lock")


def test_a_signal_to_the_queue_stops_its_run_and_leaves_the_others(desk: Desk) -> None:
    desk.queue("long", "wait")
    desk.queue("next", "learn")
    process = desk.start()
    wait_for(lambda: desk.order() == ["long"])
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert desk.states() == {"long": "stopped", "next": "waiting"}


def test_after_a_kill_the_next_queue_waits_for_the_trainer_that_is_left(desk: Desk, runner: ModuleType) -> None:
    orphan = desk.queue("orphan", "wait")
    killed = desk.start()
    wait_for(lambda: desk.order() == ["orphan"])
    killed.kill()
    killed.wait()
    assert runner.is_held(orphan / ".lock")
    desk.queue("next", "learn")
    process = desk.start()
    wait_for(lambda: runner.is_held(desk.runs / ".queue.lock"))
    assert desk.states() == {"orphan": "running", "next": "waiting"}
    runner.ask_to_stop(orphan)
    assert process.wait() == 0
    assert desk.order() == ["orphan", "next"]
    assert desk.states() == {"orphan": "stopped", "next": "done"}


def test_a_run_queued_again_waits_for_its_own_trainer_that_is_left(desk: Desk, runner: ModuleType) -> None:
    folder = desk.queue("orphan", "wait")
    killed = desk.start()
    wait_for(lambda: desk.order() == ["orphan"])
    killed.kill()
    killed.wait()
    runner.write_job(folder, runner.Job("waiting", 1.0, "orphan"))  # as the node does
    (folder / "recipe.yaml").write_text("learn")
    process = desk.start()
    wait_for(lambda: desk.states() == {"orphan": "running"})
    assert desk.order() == ["orphan"]
    owner = json.loads((folder / ".lock-owner.json").read_text())["pid"]
    os.kill(owner, signal.SIGTERM)
    assert process.wait() == 0
    assert desk.order() == ["orphan", "orphan"]
    assert desk.states() == {"orphan": "done"}


def test_a_lora_never_replaces_another_and_never_leaves_its_folder(desk: Desk, runner: ModuleType) -> None:
    folder = desk.queue("run", "learn", "mine/fast")
    (folder / "lora.safetensors").write_text("new")
    (desk.loras / "mine").mkdir()
    (desk.loras / "mine" / "fast.safetensors").write_text("old")
    job = runner.read_job(folder)
    for _ in range(2):  # the same LoRA is copied once
        assert runner.publish(folder, job, desk.loras).saved == "mine/fast_00001_.safetensors"
    assert sorted(path.name for path in (desk.loras / "mine").iterdir()) == [
        "fast.safetensors",
        "fast_00001_.safetensors",
    ]
    os.symlink(desk.runs, desk.loras / "linked")
    for name in ("../up", "a/../../up", str(desk.runs / "up"), "linked/up", ""):
        with pytest.raises(ValueError, match="leads out of"):
            runner.publish(folder, replace(job, lora=name), desk.loras)
    assert not list(desk.runs.rglob("up*"))
