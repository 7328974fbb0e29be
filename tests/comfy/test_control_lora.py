"""Control-LoRAs are those that were trained, under a Flash LoRA too: the base model's weights plus their update.

Compared with the whole ControlNet of the same sum, with random weights. The demo's adapters are tried in the formats
that they ship in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..families.adapters import save_weights, tiny_unet
from ..families.networks import POOLED_WIDTH, TEXT_WIDTH
from .client import Client

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-4  # of the latent's standard deviation
FAMILIES = ("sd15", "sdxl")
STRENGTHS = (0.0, 0.5, 1.0)  # of the Flash LoRA


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and prompts, and what the script in ComfyUI's process wrote beside them."""
    folder = tmp_path_factory.mktemp("control_lora")
    for family in FAMILIES:
        network = tiny_unet(family)
        save_weights(network, folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
    torch.manual_seed(3)
    demo_adapter = T2IAdapter(
        channels=[64, 128, 128], num_res_blocks=2, downscale_factor=16, adapter_type="full_adapter_xl"
    )
    save_weights(demo_adapter, folder / "canny_t2i_adapter.safetensors")
    generator = torch.Generator().manual_seed(9)
    given = {
        "positive": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "positive.pooled": torch.randn(1, POOLED_WIDTH, generator=generator),
        "hint": (torch.rand(1, 3, 128, 192, generator=generator) > 0.8).float(),
        "square": (torch.rand(1, 3, 128, 128, generator=generator) > 0.8).float(),
    }
    save_file(given, folder / "given.safetensors")
    script = Path(__file__).resolve().parent / "inside" / "control_lora.py"
    command = [sys.executable, script, runtime.comfyui_folder(), root, folder]
    done = subprocess.run(command, env=runtime.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "results")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "said.json").read_text())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the reference's standard deviation."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_it_is_the_controlnet_that_was_trained(results: dict[str, Tensor], family: str, strength: float) -> None:
    whole = results[f"{family}, {strength}, whole"]
    steering = relative(results[f"{family}, {strength}, unsteered"], whole)
    assert relative(results[f"{family}, {strength}, ours"], whole) < TOLERANCE
    assert steering > 0.05  # there is something to compare
    # What ComfyUI makes of it is another ControlNet as soon as a LoRA is patched in.
    core = relative(results[f"{family}, {strength}, core"], whole)
    assert core < TOLERANCE if strength == 0 else core > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", ["loaded", "patched on the fly", "half"])
def test_wherever_the_model_lies(results: dict[str, Tensor], said: dict[str, Any], family: str, state: str) -> None:
    """Patched in, patched on the fly where memory is short, and some of each; the counts say that it is so."""
    assert relative(results[f"{family}, residuals, {state}"], results[f"{family}, residuals, whole"]) < TOLERANCE
    loaded, fly, half = (said[f"{family}, {name}"] for name in ("loaded", "patched on the fly", "half"))
    assert loaded > half >= fly


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_after_a_run(said: dict[str, Any], family: str) -> None:
    assert said[f"{family}, nothing is left"]


def test_the_demo_takes_the_formats_that_ship_with_it(results: dict[str, Tensor], said: dict[str, Any]) -> None:
    made, expected = said["hint channels"]
    assert made == expected
    assert relative(results["demo, ours"], results["demo, whole"]) < TOLERANCE
    assert relative(results["demo, core"], results["demo, whole"]) > 10 * TOLERANCE
    for case in ("demo, ours", "demo, T2I-adapter"):
        assert relative(results[case], results["demo, plain"]) > 0.01, case


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("without a hint", ["broken_control_lora.safetensors", "input_hint_block"]),
        ("without down halves", ["broken_control_lora.safetensors", "down half"]),
        ("of SDXL", ["ControlNet", "a vector of", "the model is SD 1.5"]),
    ],
)
def test_what_does_not_fit_is_refused_in_words(said: dict[str, Any], case: str, words: list[str]) -> None:
    assert case in said, f"{case} was taken"
    for word in words:
        assert word in said[case]


def test_the_demos_adapters_are_listed_where_they_lie(client: Client, root: Path) -> None:
    """Core's loader sees them too."""
    shipped = {file.name for file in (root / "trainer" / "demo" / "control").glob("*.safetensors")}
    nodes = client.object_info()
    core = nodes["ControlNetLoader"]["input"]["required"]["control_net_name"]
    ours = nodes["FlashAdapterApply"]["input"]["required"]["adapter_name"]
    for field in (core, ours):
        options = field[1].get("options") if len(field) > 1 else None
        assert shipped <= set(options or field[0])
