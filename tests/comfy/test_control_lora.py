"""Control-LoRAs equal the base model's weights plus their update, also under a Flash LoRA.

The reference is the whole ControlNet with the same sums, with random weights. The demo's adapters are tried in their
published formats, as the trainer writes them; their reference is diffusers' ControlNet.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash_diffusion.flash_core.lora import LoraModule
from flash_diffusion.trainer.teachers.conditions.control_lora import expanded, write_control_lora

from ..families.adapters import save_weights, tiny_controlnet, tiny_unet
from ..families.networks import POOLED_WIDTH, TEXT_WIDTH
from .client import Client
from .inside_comfyui import relative, run_inside

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-4  # of the latent's standard deviation
FAMILIES = ("sd15", "sdxl")
STRENGTHS = (0.0, 0.5, 1.0)  # of the Flash LoRA
RANK, SPREAD = 8, 0.05  # of the demo's random Control-LoRA


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write models and prompts, run the script in ComfyUI's process, and return the folder with its results."""
    folder = tmp_path_factory.mktemp("control_lora")
    for family in FAMILIES:
        network = tiny_unet(family)
        save_weights(network, folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
    save_demo_adapters(folder, root / "trainer" / "demo" / "teacher")
    generator = torch.Generator().manual_seed(9)
    given = {
        "positive": torch.randn(1, 7, TEXT_WIDTH, generator=generator),
        "positive.pooled": torch.randn(1, POOLED_WIDTH, generator=generator),
        "hint": (torch.rand(1, 3, 128, 192, generator=generator) > 0.8).float(),
        "square": (torch.rand(1, 3, 128, 128, generator=generator) > 0.8).float(),
    }
    save_file(given, folder / "given.safetensors")
    run_inside(runtime, "control_lora.py", folder)
    return folder


def save_demo_adapters(folder: Path, teacher: Path) -> None:
    """Save the demo's two adapters with random weights, and the second one as a whole ControlNet of diffusers."""
    torch.manual_seed(3)
    sizes = {"channels": [64, 128, 128, 128], "num_res_blocks": 1, "downscale_factor": 16}
    adapter = T2IAdapter(in_channels=1, adapter_type="full_adapter_xl", **sizes)
    save_weights(adapter, folder / "canny_t2i_adapter.safetensors")
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", torch_dtype=torch.float32)
    parts = ("down_blocks.", "mid_block.")
    modules = {
        name: LoraModule(
            name, SPREAD * torch.randn(RANK, *layer.weight.shape[1:]), SPREAD * torch.randn(len(layer.weight), RANK)
        )
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.startswith(parts)
    }
    norms = {
        f"{name}.{part}": value + SPREAD * torch.randn_like(value)
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.GroupNorm) and name.startswith(parts)
        for part, value in layer.state_dict().items()
    }
    network = tiny_controlnet(unet, seed=5)
    own = {name: value for name, value in network.state_dict().items() if name.startswith("controlnet_")}
    path = folder / "canny_control_lora.safetensors"
    write_control_lora(path, modules, {**own, **norms}, unet.config["layers_per_block"], {}, torch.float32)
    save_weights(expanded(load_file(path), unet, path.name), folder / "canny_controlnet.safetensors")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "results")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "said.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_control_lora_equals_its_whole_controlnet_under_a_flash_lora(
    results: dict[str, Tensor], family: str, strength: float
) -> None:
    whole = results[f"{family}, {strength}, whole"]
    steering = relative(results[f"{family}, {strength}, unsteered"], whole)
    assert relative(results[f"{family}, {strength}, ours"], whole) < TOLERANCE
    assert steering > 0.05  # there is something to compare
    # What ComfyUI makes of it is another ControlNet as soon as a LoRA is patched in.
    core = relative(results[f"{family}, {strength}, core"], whole)
    assert core < TOLERANCE if strength == 0 else core > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("state", ["loaded", "patched on the fly", "half"])
def test_a_control_lora_works_for_every_place_of_the_weights(
    results: dict[str, Tensor], said: dict[str, Any], family: str, state: str
) -> None:
    """Weights patched in, patched on the fly (low memory), and some of each; counts confirm which."""
    assert relative(results[f"{family}, residuals, {state}"], results[f"{family}, residuals, whole"]) < TOLERANCE
    loaded, fly, half = (said[f"{family}, {name}"] for name in ("loaded", "patched on the fly", "half"))
    assert loaded > half > fly == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_no_weights_behind(said: dict[str, Any], family: str) -> None:
    assert said[f"{family}, nothing is left"]


def test_the_demos_adapter_formats_agree(results: dict[str, Tensor]) -> None:
    assert relative(results["demo, ours"], results["demo, whole"]) < TOLERANCE
    assert relative(results["demo, core"], results["demo, whole"]) > 10 * TOLERANCE
    for case in ("demo, ours", "demo, T2I-adapter"):
        assert relative(results[case], results["demo, plain"]) > 0.01, case


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("without a hint", ["broken_control_lora.safetensors", "input_hint_block"]),
        ("without down halves", ["broken_control_lora.safetensors", "down half"]),
        ("without zero convolutions", ["broken_control_lora.safetensors", "zero_convs.0.0", "download"]),
        ("core's, without zero convolutions", ["control_net is incomplete", "zero_convs.0.0", "download"]),
        ("without one zero convolution", ["zero_convs.2.0"]),
        ("without a middle", ["middle_block_out.0"]),
        ("without a hint layer", ["input_hint_block.4"]),
        ("of SDXL", ["ControlNet", "a vector of", "the model is SD 1.5"]),
    ],
)
def test_a_wrong_control_lora_raises_a_readable_error(said: dict[str, Any], case: str, words: list[str]) -> None:
    assert case in said, f"{case}: no error was raised"
    for word in words:
        assert word in said[case]


def test_loaders_list_the_demos_adapters(client: Client, root: Path) -> None:
    """Core's loader lists them too."""
    shipped = {file.name for file in (root / "trainer" / "demo" / "control").glob("*.safetensors")}
    nodes = client.object_info()
    core = nodes["ControlNetLoader"]["input"]["required"]["control_net_name"]
    ours = nodes["FlashAdapterApply"]["input"]["required"]["adapter_name"]
    for field in (core, ours):
        options = field[1].get("options") if len(field) > 1 else None
        assert shipped <= set(options or field[0])
