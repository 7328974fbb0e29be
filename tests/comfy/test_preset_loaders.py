"""The loaders recognise published few-step LoRAs by name and family, and the sampler sets itself up from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash_diffusion.flash_core.lora import FlashMetadata

from ..families.networks import tiny_network
from . import prompts
from .client import Client
from .inside_comfyui import relative, run_inside
from .test_sampling_families import make_given

pytestmark = pytest.mark.comfy

LIGHTNING = "sdxl_lightning_4step_lora.safetensors"


def save_lora(path: Path, network: nn.Module, prefix: str, header: dict[str, str] | None = None) -> None:
    """Write a random LoRA on the attention of a tiny network, as kohya's scripts (UNets) or as PEFT (transformers)."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("to_q", "to_k", "to_v")):
            halves = (torch.randn(2, module.in_features, generator=generator), torch.randn(module.out_features, 2))
            if prefix == "lora_unet_":
                keys = [f"{prefix}{name.replace('.', '_')}.lora_{half}.weight" for half in ("down", "up")]
            else:
                keys = [f"{prefix}{name}.lora_{half}.weight" for half in ("A", "B")]
            tensors |= dict(zip(keys, (0.2 * half for half in halves), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=header)


@pytest.fixture(scope="module")
def folder(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the networks and the LoRAs, and load them in ComfyUI's process."""
    folder = tmp_path_factory.mktemp("preset_loaders")
    networks = {family: tiny_network(family) for family in ("sdxl", "sd3")}
    for family, network in networks.items():
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / f"{family}.safetensors")
        (folder / f"{family}.json").write_text(json.dumps(dict(network.config)))
        save_file(make_given(family), folder / f"{family}.given.safetensors")
    loras = folder / "loras"
    save_lora(loras / LIGHTNING, networks["sdxl"], "lora_unet_")
    for name in (
        "lightning_strike_style.safetensors",
        "dmd2_sdxl_4step_lora_fp16.safetensors",
        "Hyper-SDXL-8steps-CFG-lora.safetensors",
        "TCD-SDXL-LoRA/pytorch_lora_weights.safetensors",
        "Hyper-SD15-8steps-lora.safetensors",
    ):
        (loras / name).parent.mkdir(exist_ok=True)
        shutil.copy(loras / LIGHTNING, loras / name)
    metadata = FlashMetadata("sdxl", "epsilon", "vp", {4: (999.0, 749.0, 499.0, 249.0)})
    save_lora(loras / "with_metadata.safetensors", networks["sdxl"], "lora_unet_", metadata.to_header())
    # The name of a published LoRA does not count against the file's own metadata.
    save_lora(loras / "own" / LIGHTNING, networks["sdxl"], "lora_unet_", metadata.to_header())
    for place in ("", "eighth"):
        save_lora(loras / place / "Hyper-SD3-4steps-CFG-lora.safetensors", networks["sd3"], "transformer.")
    run_inside(runtime, "preset_loaders.py", folder)
    return folder


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "loaders.json").read_text())


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "loaders.results")


@pytest.mark.parametrize(
    ("name", "preset", "lines"),
    [
        (
            LIGHTNING,
            "SDXL-Lightning, 4 steps",
            [
                "preset: taken for SDXL-Lightning, 4 steps, by its file name",
                "Flash Sampler's 'auto' samples it so: Euler, no fresh noise",
                "set there: steps 4, guidance 1",
                "source: https://huggingface.co/ByteDance/SDXL-Lightning",
            ],
        ),
        ("Hyper-SDXL-8steps-CFG-lora.safetensors", "Hyper-SD CFG, 8 steps", ["set there: steps 8, guidance 5 to 8"]),
        ("TCD-SDXL-LoRA/pytorch_lora_weights.safetensors", "TCD", ["taken for TCD, by its folder's name"]),
        (
            "Hyper-SD3-4steps-CFG-lora.safetensors",
            "Hyper-SD3, 4 steps",
            ["note: Hyper-SD3 is made for strength 0.125; here strength is 1", "guidance 3"],
        ),
        ("lightning_strike_style.safetensors", None, ["no Flash metadata and no known name", "choose its preset"]),
        ("Hyper-SD15-8steps-lora.safetensors", None, ["no known name"]),  # its layers are SDXL's
        ("stack", "SDXL-Lightning, 4 steps", ["preset: taken for SDXL-Lightning, 4 steps, by its file name"]),
        ("style slot", None, []),
        ("core", None, []),
        ("untouched", None, []),
        ("twice", "SDXL-Lightning, 4 steps", ["WARNING: the model already has a few-step LoRA, DMD2, 4 steps"]),
        ("over metadata", "SDXL-Lightning, 4 steps", ["WARNING: the model already has a few-step LoRA, 'Flash LoRA'"]),
        ("metadata over preset", None, ["WARNING: the model already has a few-step LoRA, SDXL-Lightning, 4 steps"]),
        ("style after", "SDXL-Lightning, 4 steps", ["'auto' goes on to follow SDXL-Lightning, 4 steps"]),
        (f"own/{LIGHTNING}", None, ["trained for: 4 steps"]),
    ],
)
def test_a_loader_says_what_it_took_the_file_for(
    facts: dict[str, dict[str, Any]], name: str, preset: str | None, lines: list[str]
) -> None:
    assert facts[name]["preset"] == preset
    for line in lines:
        assert line in facts[name]["report"]


def test_a_model_has_either_metadata_or_a_preset(facts: dict[str, dict[str, Any]]) -> None:
    assert all(not (one["metadata"] and one["preset"]) for one in facts.values())
    assert facts["metadata over preset"]["metadata"]
    assert not facts["over metadata"]["metadata"]
    assert facts[f"own/{LIGHTNING}"]["metadata"]


def test_the_right_strength_gives_no_note(facts: dict[str, dict[str, Any]]) -> None:
    report = facts["eighth/Hyper-SD3-4steps-CFG-lora.safetensors"]["report"]
    assert "taken for Hyper-SD3" in report
    assert "is made for strength" not in report


def test_the_sampler_sets_itself_up_from_the_loader(results: dict[str, Tensor]) -> None:
    """Recognised by our loaders, or chosen by hand after core's loader: the same latent, unlike a plain LoRA's."""
    assert torch.equal(results["auto"], results["stack"])
    assert relative(results["core, by hand"], results["auto"]) <= 1e-3
    assert relative(results["core, auto"], results["auto"]) > 0.1
    assert relative(results["renamed"], results["core, auto"]) <= 1e-3


def test_a_preset_by_hand_runs_in_the_server_and_is_shown_on_the_node(client: Client) -> None:
    run = client.run(prompts.latents(None, seed=41, stochasticity="auto", guidance=1.0, preset="Hyper-SD"))
    assert run.succeeded, run.error
    assert run.texts[prompts.SAMPLER].splitlines() == [
        "t = 999, 749, 499, 249",
        "Hyper-SD (your choice): DDIM, no fresh noise, guidance 1",
        "WARNING: Hyper-SD is for SD 1.5 and SDXL; the model is the Flash demo",
        "(4 evaluations, predicts v)",
    ]


def test_the_preset_is_the_last_input_of_its_nodes(client: Client) -> None:
    """The values of saved workflows stand in the order of the inputs."""
    nodes = client.object_info()
    for name in ("FlashSampler", "FlashScheduler", "FlashSamplerSelect", "FlashAdapterApply", "FlashUpscale"):
        assert list(nodes[name]["input"]["optional"])[-1] == "preset"
