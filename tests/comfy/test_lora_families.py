"""LoRA files of diffusers and PEFT fit ComfyUI's models of every family, layer by layer, or raise an error.

Names and shapes come from diffusers' model classes. All models are "meta" tensors, without memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file

from ..families.published_loras import FACTS, published_network, write_published
from ..families.single_file import unet_names
from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

RANK = 2
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "proj_mlp")
UNET_TARGETS = (*TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj")
PUBLISHED = {"sd15": "flash-sd", "sdxl": "flash-sdxl", "sd3": "flash-sd3", "pixart": "flash-pixart"}
# unet/config.json of stable-diffusion-2-1 and of stable-diffusion-x4-upscaler.
SD2_SIZES: dict[str, dict[str, Any]] = {
    "sd21": {"attention_head_dim": (5, 10, 20, 20)},
    "sd_x4": {
        "in_channels": 7,
        "block_out_channels": (256, 512, 512, 1024),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        "only_cross_attention": (True, True, True, False),
        "attention_head_dim": 8,
        "num_class_embeds": 1000,
    },
}
PREFIX = {"sd15": "unet.", "sdxl": "base_model.model.", "sd3": "transformer.", "pixart": "base_model.model."}


def diffusers_model(family: str) -> torch.nn.Module:
    """Build a model of the family at its published sizes (Flux with fewer blocks), without memory."""
    if family == "flux":
        with torch.device("meta"):
            return FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    if family in ("sd21", "sd_x4"):
        with torch.device("meta"):
            return UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True, **SD2_SIZES[family])
    return published_network(PUBLISHED[family])


def save_lora(path: Path, model: torch.nn.Module, prefix: str) -> int:
    """Save a LoRA on the model's layers in PEFT's format, and return the number of its layers."""
    targets = UNET_TARGETS if isinstance(model, UNet2DConditionModel) else TARGETS
    tensors = {}
    for name, module in model.named_modules():
        if not name.endswith(tuple(f".{target}" for target in targets)):
            continue
        outputs, inputs, *kernel = module.weight.shape
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.zeros(RANK, inputs, *kernel)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.zeros(outputs, RANK, *(1 for _ in kernel))
    save_file(tensors, path)
    return len(tensors) // 2


@pytest.fixture(scope="module")
def answers(
    runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Return the answers of ComfyUI's models to the LoRAs, and each LoRA's number of layers."""
    folder = tmp_path_factory.mktemp("families")
    requests, totals = {}, {}
    for family in ("sd15", "sd21", "sd_x4", "sdxl", "sd3", "pixart", "flux"):
        model = diffusers_model(family)
        path = folder / f"{family}.safetensors"
        totals[family] = save_lora(path, model, PREFIX.get(family, "transformer."))
        state = unet_names(model) if family == "sd_x4" else model.state_dict()  # ComfyUI detects it by these names only
        shapes = {key: list(value.shape) for key, value in state.items()}
        requests[family] = {"shapes": shapes, "lora": str(path)}
        if family in PUBLISHED:
            name = PUBLISHED[family]
            requests[name] = {"shapes": shapes, "lora": str(folder / f"{name}.safetensors")}
            totals[name] = write_published(name, folder / f"{name}.safetensors", kohya=name == "flash-sdxl")
    requests["sd3 model, sd15 lora"] = {"shapes": requests["sd3"]["shapes"], "lora": requests["sd15"]["lora"]}
    requests["sdxl model, sd15 lora"] = {"shapes": requests["sdxl"]["shapes"], "lora": requests["sd15"]["lora"]}
    requests["sd15 model, sdxl lora"] = {"shapes": requests["sd15"]["shapes"], "lora": requests["sdxl"]["lora"]}
    requests["sd21 model, sd_x4 lora"] = {"shapes": requests["sd21"]["shapes"], "lora": requests["sd_x4"]["lora"]}
    requests["sd_x4 model, sd21 lora"] = {"shapes": requests["sd_x4"]["shapes"], "lora": requests["sd21"]["lora"]}
    requests["sd15 model, sd3 lora"] = {"shapes": requests["sd15"]["shapes"], "lora": requests["sd3"]["lora"]}
    (folder / "requests.json").write_text(json.dumps(requests))
    printed = run_inside(runtime, "families.py", folder / "requests.json")
    return json.loads(printed.splitlines()[-1]), totals


@pytest.mark.parametrize("family", ["sd15", "sd21", "sd_x4", "sdxl", "sd3", "pixart", "flux"])
def test_every_layer_is_patched(answers, family: str) -> None:
    answer, total = answers[0][family], answers[1][family]
    assert "error" not in answer
    assert answer["matched"] == answer["total"] == total
    assert total > 10


@pytest.mark.parametrize(("family", "side"), [("sd15", 512), ("sd_x4", 512), ("sdxl", 1024), ("sd3", 1024)])
def test_the_native_side_is_the_training_size(answers, family: str, side: int) -> None:
    assert answers[0][family]["side"] == side


def test_lora_nodes_obey_disable_mmap(answers) -> None:
    assert answers[0]["--disable-mmap"] == {"FlashLoraLoader": [True, False], "FlashLoraStack": [True, False]}


@pytest.mark.parametrize("name", FACTS)
def test_published_files_patch_every_layer_at_the_trained_scale(answers, name: str) -> None:
    """Flash PixArt has two layers for the picture's height and two for its width, stock models two for both."""
    answer, total = answers[0][name], answers[1][name]
    rank, _, alpha, _ = FACTS[name]
    shared = 2 if name == "flash-pixart" else 0
    assert "error" not in answer
    assert answer["matched"] == answer["total"] == answer["patches"] == total - shared
    assert answer["complete"]
    assert answer["published"] == f"jasperai/{name}"
    # What ComfyUI will multiply the update by; the shared layers hold their scale in their halves.
    assert sorted(answer["scales"].items()) == sorted(
        {str(alpha / rank): total - 2 * shared, **({"1.0": shared} if shared else {})}.items()
    )


@pytest.mark.parametrize(
    ("case", "lora", "model"),
    [
        ("sdxl model, sd15 lora", "SD 1.5 (attn2 reads 768 channels)", "SDXL (attn2 reads 2048 channels)"),
        ("sd15 model, sdxl lora", "SDXL (attn2 reads 2048 channels)", "SD 1.5 (attn2 reads 768 channels)"),
        (
            "sd21 model, sd_x4 lora",
            "the SD x4 upscaler (attn2 reads 1024 channels)",
            "SD 2 (attn2 reads 1024 channels)",
        ),
        (
            "sd_x4 model, sd21 lora",
            "SD 2 (attn2 reads 1024 channels)",
            "the SD x4 upscaler (attn2 reads 1024 channels)",
        ),
        ("sd15 model, sd3 lora", "SD3 medium or SD3.5 medium", "SD 1.5 (attn2 reads 768 channels)"),
        ("sd3 model, sd15 lora", "SD 1.5 (attn2 reads 768 channels)", "SD3 medium (1536 channels wide)"),
    ],
)
def test_another_family_raises_an_error_with_both_names(answers, case: str, lora: str, model: str) -> None:
    error = answers[0][case]["error"]
    assert f"It is for {lora}" in error
    assert f"the model is {model}" in error
