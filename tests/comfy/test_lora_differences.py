"""LoRAs of core's "Extract and Save LoRA" with bias_diff on: the same bits as with core's own loader.

Tiny networks in ComfyUI's process (``inside/lora_differences.py``); core makes the files and loads them beside ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import save_file

from ..families.networks import tiny_network
from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

FAMILIES = ("sd15", "sdxl", "pixart_sigma", "sd3", "flux")


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the networks, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("lora_differences")
    for family in FAMILIES:
        network = tiny_network(family)
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
    run_inside(runtime, "lora_differences.py", folder, *FAMILIES)
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    return json.loads((folder / "said.json").read_text())


@pytest.mark.parametrize("model", [*FAMILIES, "text encoder"])
def test_an_extracted_lora_gives_the_bits_of_cores_loader(facts: dict[str, Any], model: str) -> None:
    found = facts[model]
    assert found["differ"] == 0
    assert found["changed"] > found["biases"] > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_counts_whole_changes(facts: dict[str, Any], said: dict[str, str], family: str) -> None:
    report = said[f"{family}, report"]
    assert f"biases ({facts[family]['biases']})" in report
    assert "left out" not in report


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_changes_that_do_not_fit_raise_a_readable_error(said: dict[str, str], family: str) -> None:
    words = "changes of whole weights or biases that do not fit the model: 2"
    assert words in said[f"{family}, unfit"]
    assert "allow_partial" in said[f"{family}, unfit"]
    assert f"left out: {words}" in said[f"{family}, a part"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_whole_weights_names_the_loader_that_takes_it(said: dict[str, str], family: str) -> None:
    error = said[f"{family}, whole weights alone"]
    assert f"{family}_whole.safetensors holds changes of whole weights" in error
    assert "ComfyUI's own loader, Load LoRA" in error


def test_the_bias_of_a_fused_layer_changes_in_its_slice(facts: dict[str, Any]) -> None:
    """At strength 0.5, the middle third of the bias of query, key and value."""
    assert facts["slice"] < 1e-6


def test_text_encoders_get_their_whole_changes_where_the_clip_is_connected(said: dict[str, str]) -> None:
    assert "text encoder: 37/37 layers" in said["text encoder, stack"]
    assert "37 text encoder layers; connect 'clip'" in said["text encoder, stack without clip"]
    assert "changes of text encoders' whole weights or biases: 22" in said["text encoder, loader"]
