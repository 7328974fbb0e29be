"""The script behind ``make comfy`` and ``make demo``: it runs a workflow headless, and its errors are readable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from . import prompts

pytestmark = pytest.mark.comfy


def test_run_workflow_saves_the_pictures(runtime: ModuleType, server, tmp_path: Path) -> None:
    prompt = prompts.shipped()
    prompt[prompts.SAMPLER]["inputs"]["seed"] = 4711  # no other test's: what is cached is not saved again
    pictures = runtime.run_workflow(server, prompt, tmp_path / "pictures")
    assert len(pictures) == prompt[prompts.EMPTY]["inputs"]["batch_size"]
    assert {Image.open(picture).size for picture in pictures} == {(128, 128)}


def test_an_error_names_the_node_that_failed(runtime: ModuleType, server, tmp_path: Path) -> None:
    prompt = prompts.latents(None, seed=1, guidance=3.0)
    with pytest.raises(runtime.RuntimeProblem, match=r"\(FlashSampler\): guidance is 3"):
        runtime.run_workflow(server, prompt, tmp_path)


def test_an_invalid_workflow_shows_comfyuis_message(runtime: ModuleType, server, tmp_path: Path) -> None:
    prompt = prompts.shipped()
    prompt[prompts.LORA]["inputs"]["lora_name"] = "no such file.safetensors"
    with pytest.raises(runtime.RuntimeProblem, match=r"no such file\.safetensors"):
        runtime.run_workflow(server, prompt, tmp_path)


def test_the_users_lora_replaces_the_workflows(runtime: ModuleType) -> None:
    prompt = prompts.shipped()
    runtime.use_lora(prompt, "mine.safetensors")
    assert prompt[prompts.LORA]["inputs"]["lora_name"] == "mine.safetensors"
    del prompt[prompts.LORA]
    with pytest.raises(runtime.RuntimeProblem, match="no LoRA loader"):
        runtime.use_lora(prompt, "mine.safetensors")


def test_an_error_names_a_wrong_comfyui_path(
    runtime: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(runtime.RuntimeProblem, match="COMFYUI_PATH is .* no main.py"):
        runtime.fetch()


def test_an_error_names_a_missing_lora_file(runtime: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(runtime.RuntimeProblem, match="--lora takes the path"):
        runtime.prepare_base(tmp_path, [tmp_path / "missing.safetensors"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no interrupts to ignore")
def test_a_server_that_ignores_interrupts_stops(runtime: ModuleType, tmp_path: Path) -> None:
    """As one does that was started in the background."""
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('here', flush=True)\nsignal.pause()\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    runtime.Server("http://nowhere", tmp_path, tmp_path / "comfyui.log", process).stop()
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGTERM


def test_installed_packages_are_pinned(runtime: ModuleType) -> None:
    import torch

    assert f"torch=={torch.__version__}" in runtime.pinned_environment().splitlines()
