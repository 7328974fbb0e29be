"""Whole runs over a stream: killed and resumed they give the same LoRA, and processes share the global batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.data.streaming.examples import StreamBatches
from flash_diffusion.trainer.data.streaming.reader import FramedSample
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError

from ..forks.client import Forks
from .conftest import ROOT
from .shards import shard, tar
from .sharing import run_shared
from .test_resume import assert_same_file


@pytest.fixture
def stream_content(recipe_content: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe that streams four shards of 64 px."""
    for number in range(4):
        (tmp_path / f"s-{number}.tar").write_bytes(shard(10 * number, 3 + number, 64))
    data = {"source": "webdataset", "path": str(tmp_path / "s-{0..3}.tar"), "stream": True, "lanes": 2, "shuffle": 6,
            "workers": 0, "caption_dropout": 0.2}  # fmt: skip
    return recipe_content | {"data": data}


def test_resuming_at_any_checkpoint_gives_the_same_lora(stream_content: dict[str, Any], tmp_path: Path) -> None:
    """With and without the counts of samples that the run before has left."""
    stream_content |= {"checkpoint": {"every": 1, "keep": 10}, "preview": {"every": 0, "steps": [1]}}
    recipe = parse_recipe(stream_content)
    distil(recipe, tmp_path / "whole")
    for kept in (2, 4):
        output = tmp_path / f"from-{kept}"
        shutil.copytree(checkpoint.checkpoint_path(tmp_path / "whole", kept), checkpoint.checkpoint_path(output, kept))
        stream_content["data"]["cache"] = str(tmp_path / "empty") if kept == 4 else None
        distil(parse_recipe(stream_content), output, resume=True)
        assert_same_file(output / "lora.safetensors", tmp_path / "whole" / "lora.safetensors")
    cached = parse_recipe({**stream_content, "data": stream_content["data"] | {"stream": False}})
    distil(cached, tmp_path / "cached")  # the same shards, the other way


def start(file: Path, output: Path) -> subprocess.Popen[str]:
    """Start a run in a process group of its own, as a terminal does."""
    command = [sys.executable, "-m", "trainer", "distill", str(file), "--output", str(output)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_a_checkpoint(process: subprocess.Popen[str], output: Path) -> None:
    while not checkpoint.checkpoints(output):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups with signals")
def test_a_stopped_run_with_workers_resumes_exactly(stream_content: dict[str, Any], tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the workers too."""
    stream_content |= {
        "phases": [{"name": "all", "updates": 12, "modes": [0, 0, 0, 1], "adversarial": 0.3}],
        "checkpoint": {"every": 3},
    }
    stream_content["data"]["workers"] = 2
    file, output = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(stream_content))
    process = start(file, output)
    wait_for_a_checkpoint(process, output)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT, text
    assert "Traceback" not in text, text
    last = checkpoint.read_facts(checkpoint.checkpoints(output)[-1])[0].update
    assert last < 12
    distil(parse_recipe(stream_content), output, resume=True)
    stream_content["data"]["workers"] = 0
    distil(parse_recipe(stream_content), tmp_path / "whole")
    assert_same_file(output / "lora.safetensors", tmp_path / "whole" / "lora.safetensors")


RECORDING = """
import json, sys
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.data.streaming.examples import StreamBatches

read = StreamBatches.batch


def batch(self, position):
    samples = read(self, position)
    with open(f"{sys.argv[-1]}-{self.rank}.jsonl", "a") as file:
        file.writelines(json.dumps([sample.position, sample.name]) + "\\n" for sample in samples)
    return samples


if __name__ == "__main__":
    StreamBatches.batch = batch
    sys.exit(main(sys.argv[1:-1]))
"""


def test_two_processes_see_the_batches_of_one_with_twice_the_size(
    trainer_forks: Forks, stream_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, script = tmp_path / "recipe.yaml", tmp_path / "recording.py"
    file.write_text(yaml.safe_dump(stream_content | {"batch_size": 1}))
    script.write_text(RECORDING)
    run_shared(trainer_forks, 2, script, "distill", file, "--output", tmp_path / "two", tmp_path / "seen")
    two = [tuple(json.loads(line)) for rank in (0, 1) for line in (tmp_path / f"seen-{rank}.jsonl").open()]
    one: list[tuple[int, str]] = []
    read = StreamBatches.batch

    def recorded(self: StreamBatches, position: int) -> list[FramedSample]:
        samples = read(self, position)
        one.extend((sample.position, sample.name) for sample in samples)
        return samples

    monkeypatch.setattr(StreamBatches, "batch", recorded)
    distil(parse_recipe(stream_content | {"batch_size": 2}), tmp_path / "one")
    assert sorted(two) == one
    assert [position for position, _ in one] == list(range(10))


def test_worker_that_is_killed_ends_the_run_with_an_error(
    stream_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = StreamBatches.batch

    def killing(self: StreamBatches, position: int) -> list[FramedSample]:
        samples = read(self, position)
        if position:
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join()
        return samples

    monkeypatch.setattr(StreamBatches, "batch", killing)
    stream_content["data"]["workers"] = 1
    stream_content["phases"] = [{"name": "all", "updates": 200, "modes": [0, 0, 0, 1]}]
    with pytest.raises(UserError, match=r"a process that reads the stream has ended .*data\.workers \(1\)"):
        distil(parse_recipe(stream_content), tmp_path / "run")


def test_shard_without_samples_is_an_error_of_the_command(stream_content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s-2.tar").write_bytes(tar({"a.json": b"{}"}))
    stream_content["data"] |= {"shuffle": 1}
    with pytest.raises(UserError, match=r"s-2\.tar holds no images"):
        distil(parse_recipe(stream_content), tmp_path / "run")
