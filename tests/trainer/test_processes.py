"""The processes of a run: one folder for one run, several processes on CPUs, other numbers of them, full memories."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.distill.processes import only_run_in, start_accelerator
from flash_diffusion.trainer.distill.several.peers import Peers
from flash_diffusion.trainer.errors import UserError

from .test_resume import assert_same_file

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_in_use_is_refused_and_names_the_other_run(recipe: Recipe, tmp_path: Path) -> None:
    me = rf"process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-"
    with only_run_in(tmp_path, Accelerator()):
        for resume in (False, True):
            with pytest.raises(
                UserError, match=rf"{tmp_path} is in use by another run \({me}.*choose another --output"
            ):
                distil(recipe, tmp_path, resume=resume)
    assert distil(recipe, tmp_path).is_file()
    assert not (tmp_path / ".lock-owner.json").exists()


def test_output_that_is_a_file_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--output: .*file is a file; expected the run's folder"):
        distil(recipe, tmp_path / "file")
    with pytest.raises(UserError, match="file.below could not be written: Not a directory"):
        distil(recipe, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that nobody may write")
def test_output_that_is_read_only_is_refused(recipe: Recipe) -> None:
    words = r"/sys/kernel/run could not be written: .*\. Make the folder writable, or choose another folder"
    with pytest.raises(UserError, match=words):
        distil(recipe, Path("/sys/kernel/run"))


@pytest.mark.parametrize(
    ("size", "message"),
    # In this process accelerate has already started, alone.
    [("two", "WORLD_SIZE is 'two'; expected the number"), ("2", "2 processes were launched, but accelerate joined 1")],
)
def test_processes_that_do_not_join_are_refused(monkeypatch: pytest.MonkeyPatch, size: str, message: str) -> None:
    Accelerator()
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=message):
        start_accelerator("no")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory"),
            r"the GPU's memory is full\. Set a lower batch_size than 2, .*",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            r"the memory is full\. Set a lower batch_size than 2",
        ),
        (RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer"), "the processes lost each other"),
    ],
)
def test_full_memories_and_lost_processes_are_explained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, message: str
) -> None:
    original, calls = Distiller.student_step, []

    def failing(self: Distiller, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(Distiller, "student_step", failing)
    last = checkpoint.checkpoint_path(tmp_path, 2)
    with pytest.raises(UserError, match=rf"{message}.*; --resume goes on from {last}"):
        distil(recipe, tmp_path)


def test_other_errors_keep_their_traceback(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Distiller, *arguments: Any) -> Any:
        raise RuntimeError("mat1 and mat2")

    monkeypatch.setattr(Distiller, "student_step", failing)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        distil(recipe, tmp_path)


def launch(file: Path, output: Path, *options: str, processes: int = 2) -> subprocess.Popen[str]:
    """Start processes with torchrun, which tells accelerate nothing of CPUs."""
    command = [
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    ]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            *command,
            "-m",
            "flash_diffusion.trainer",
            "distill",
            file,
            "--output",
            output,
            *options,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(("name", "machines"), [("one_machine", 1), ("two_machines", 2)])
def test_accelerate_reads_the_shipped_files(name: str, machines: int) -> None:
    config = load_config_from_file(str(ROOT / "launch" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == "MULTI_GPU"
    assert (config.num_machines, config.num_processes) == (machines, 8 * machines)
    assert config.mixed_precision == "no"  # else accelerate would cast beside the recipe's precision


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to one process")
def test_two_processes_share_the_work_and_stop_together(
    recipe_content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One run of 12 updates; the same run, of whose processes one gets SIGTERM, and resumed.

    Discriminator and critic learn from the samples that start at pure noise: in some updates one process has none.
    """
    recipe_content["method"] |= {
        "adversarial_rows": "first_step",
        "fake_score": "critic",
        "dmd": {"rows": "first_step"},
        "critic": {"updates": 2},
    }
    recipe_content |= {"trajectories": {"count": 6, "batch": 2}, "checkpoint": {"every": 3, "keep": 9}}
    recipe_content["phases"][1]["updates"] = 10
    file, whole, stopped = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "stopped"
    file.write_text(yaml.safe_dump(recipe_content))
    process = launch(file, whole)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text
    last = checkpoint.checkpoints(whole)[-1]
    state, _ = checkpoint.read_facts(last)
    assert (state.update, state.position, state.processes) == (12, 12 * 2 * 2, 2)
    assert {path.name for path in last.glob("random-*")} == {"random-0.safetensors", "random-1.safetensors"}
    # The last line is that of the preview at the end.
    assert [json.loads(line)["update"] for line in (whole / "log.jsonl").open()] == [*range(1, 13), 12]

    process = launch(file, stopped)
    while not checkpoint.checkpoints(stopped):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.kill(json.loads((stopped / ".lock-owner.json").read_text())["pid"], signal.SIGTERM)
    text = process.communicate(timeout=600)[0]
    assert "exitcode  : 143" in text
    assert "accelerate launch --multi_gpu --num_processes 2 -m flash_diffusion.trainer distill" in text
    last = checkpoint.checkpoints(stopped)[-1]
    assert {path.name for path in last.glob("random-*")} == {"random-0.safetensors", "random-1.safetensors"}
    alone = shutil.copytree(stopped, tmp_path / "alone")
    process = launch(file, stopped, "--resume")
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text
    assert "processes before" not in text
    assert_same_file(stopped / "lora.safetensors", whole / "lora.safetensors")

    with caplog.at_level(logging.INFO):
        distil(parse_recipe(recipe_content), alone, resume=True)
    assert "processes before: 2, now: 1. An update keeps its samples: each process now takes 4 samples" in caplog.text
    ours, theirs = (load_file(run / "lora.safetensors") for run in (alone, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=0)  # a tenth of one step of the rate 1e-3


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_stops_the_others_with_a_sentence(
    recipe_content: dict[str, Any], tmp_path: Path, rank: int
) -> None:
    recipe_content |= {
        "checkpoint": {"every": 1, "keep": 2},
        "phases": [{**recipe_content["phases"][0], "updates": 5000}],
    }
    file, run = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(recipe_content))
    process = launch(file, run)
    while not checkpoint.checkpoints(run):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    pids = [json.loads((run / ".processes" / f"{number}.json").read_text())["pid"] for number in (0, 1)]
    os.kill(pids[rank], signal.SIGKILL)
    text = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert f"process {rank} of 2 (pid {pids[rank]} on {socket.gethostname()}) has ended without a word" in text
    assert f"--resume goes on from {run / 'checkpoints'}" in text
    with pytest.raises(ProcessLookupError):
        os.kill(pids[1 - rank], 0)


def test_silence_and_errors_of_other_processes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (Peers(tmp_path, rank, 3) for rank in (0, 1))
    assert here.gone() == []  # nobody has begun
    there.write()
    assert here.gone() == []
    there.write("ValueError: no")
    assert here.gone() == [f"process 1 of 3 (pid {os.getpid()} on {there.host}) has stopped: ValueError: no"]
    there.leave()
    assert here.gone() == []
    there.host = "elsewhere"
    there.write()
    assert here.gone() == []
    monkeypatch.setattr("flash_diffusion.trainer.distill.several.peers.SILENT", -1.0)
    assert here.gone() == [f"process 1 of 3 (pid {os.getpid()} on elsewhere) has given no sign of life for -1 seconds"]
