"""Ctrl-C, SIGTERM and SIGKILL at any moment: the run keeps its work, says how to go on, and goes on exactly."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.distill.loop import distil

from ..forks.client import Forked, Forks
from .conftest import ROOT, trainer_process
from .sharing import DISTIL
from .test_resume import assert_same_file, logged

SAFE = "stopping at the next safe point"
posix = pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to one process")


def recorded(run: Path) -> list[Path]:
    """Return the files of trajectories that are there."""
    return list((run / "trajectories").glob("*.safetensors"))


def wait_for(process: subprocess.Popen[str] | Forked, *patterns: tuple[Path, str]) -> None:
    """Wait until a file is there that fits one of (folder, pattern)."""
    while not any(list(folder.glob(pattern)) for folder, pattern in patterns):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)


def printed_command(text: str) -> list[str]:
    """Return the command that a stopped run printed, with this Python."""
    (line,) = (line.strip() for line in text.splitlines() if line.endswith("--resume"))
    python, *rest = shlex.split(line)
    assert python == "python"
    return [sys.executable, *rest]


@posix
@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_one_signal_saves_and_prints_how_to_resume(
    recipe_content: dict[str, Any], tmp_path: Path, name: str, code: int
) -> None:
    """SIGINT comes while it trains, SIGTERM while it records; the printed command gives the LoRA of a whole run."""
    recording = name == "SIGTERM"
    recipe_content |= {
        "phases": [{"name": "all", "updates": 6 if recording else 30, "modes": [1, 1, 1, 1]}],
        "trajectories": {"count": 60 if recording else 0, "batch": 2},
        "checkpoint": {"every": 4},
    }
    file, stopped, whole = tmp_path / "my recipe.yaml", tmp_path / "stopped", tmp_path / "whole"
    file.write_text(yaml.safe_dump(recipe_content))
    process = trainer_process("distill", file, "--set", "ema=0.5", "--output", stopped)
    wait_for(process, (stopped / "trajectories", "*.safetensors"), (stopped / "checkpoints", "[0-9]*"))
    process.send_signal(signal.Signals[name])
    text = process.communicate(timeout=300)[0]
    assert process.returncode == code, text
    assert "Traceback" not in text
    assert SAFE in text
    if recording:
        assert "no checkpoint yet" in text
        assert sum(path.stat().st_size for path in recorded(stopped)) > 0
        assert not checkpoint.checkpoints(stopped)
    else:
        last = checkpoint.checkpoints(stopped)[-1]
        assert f"the last checkpoint is {last}" in text
        lines = (stopped / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["update"] == int(last.name) < 30
    command = printed_command(text)
    if recording:
        assert command[1:3] == ["-m", "trainer"]
        assert main(command[3:]) == 0
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        assert resumed.returncode == 0, resumed.stderr
    distil(parse_recipe({**recipe_content, "ema": 0.5}), whole)
    assert_same_file(stopped / "lora.safetensors", whole / "lora.safetensors")


@posix
@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of a batch of trajectories that would take minutes."""
    recipe_content |= {"trajectories": {"count": 8000, "batch": 4000}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_content))
    process = trainer_process("distill", file, "--output", tmp_path / "run")
    wait_for(process, (tmp_path / "run" / "trajectories", "*"))
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert any(SAFE in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 130, text
    assert "stopped at once; there is no checkpoint yet" in text
    assert printed_command(text)[-3:] == ["--output", str(tmp_path / "run"), "--resume"]
    assert "Traceback" not in text
    assert not recorded(tmp_path / "run")


@posix
@pytest.mark.slow
@pytest.mark.parametrize("trajectories", [0, 6], ids=["rollouts", "trajectories"])
def test_a_killed_run_resumes_exactly(
    trainer_forks: Forks, recipe_content: dict[str, Any], tmp_path: Path, trajectories: int
) -> None:
    """Killed at a random moment, and while it writes a checkpoint: same LoRA, same log, nothing left behind."""
    recipe_content["method"]["fake_score"] = "critic"
    recipe_content |= {
        "phases": [{**phase, "updates": 8} for phase in recipe_content["phases"]],
        "trajectories": {"count": trajectories, "batch": 2},
        "checkpoint": {"every": 3},
        "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup": 3},
        "gradient_accumulation": 2,
        "log_every": 2,
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_content))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    somewhere = (killed / "trajectories", "*.safetensors"), (killed / "checkpoints", "[0-9]*")
    kills = [(somewhere, random.SystemRandom().uniform(0, 2))]
    if not trajectories:
        kills.append((((killed / "checkpoints", ".*.partial/*"),), 0.0))
    for patterns, seconds in kills:
        process = trainer_forks.start([*DISTIL, file, "--output", killed, "--resume"], ROOT, together=True)
        wait_for(process, *patterns)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        at = sorted(path.name for path in (killed / "checkpoints").glob("*"))
        print(f"killed {seconds:.3f} s after the first file; checkpoints {at}")  # noqa: T201
    distil(parse_recipe(recipe_content), killed, resume=True)
    distil(parse_recipe(recipe_content), whole)
    assert_same_file(killed / "lora.safetensors", whole / "lora.safetensors")
    assert [path.name for path in checkpoint.checkpoints(killed)] == ["00000015", "00000016"]
    assert len(list((killed / "checkpoints").iterdir())) == 2
    lines = logged(killed)
    assert lines == logged(whole)
    assert [line["update"] for line in lines if "total" in line] == list(range(2, 17, 2))
