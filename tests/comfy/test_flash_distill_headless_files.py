"""Flash Distill Headless on a checkpoint and a folder of pictures: the LoRA fits the model that ComfyUI loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from ..families.pipelines import save_pipeline
from ..families.single_file import save_single_file
from . import prompts
from .client import Client

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

SQUARES = ("red", "blue")
UPDATES, EVERY = 4, 2


def write_checkpoint(models: Path) -> None:
    """Write a checkpoint that ComfyUI and the trainer take for SD 1.5, and the folder with its configuration.

    The UNet has SD 1.5's width and text, and two levels. The file lacks the other parts: ComfyUI takes them only
    in their true sizes. The trainer takes them from the folder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(320, 320),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    folder = save_pipeline("sd15", models / "diffusers" / "small_sd15", unet=unet)
    (models / "checkpoints").mkdir(parents=True)
    save_single_file(
        StableDiffusionPipeline.from_pretrained(folder),
        models / "checkpoints" / "small_sd15.safetensors",
        without=("first_stage_model.", "cond_stage_model."),
        dtype=torch.float16,
    )
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()  # else the folder could be taken for the file


def test_a_checkpoint_learns_from_a_dataset_and_its_lora_fits(runtime, tmp_path: Path) -> None:
    node = prompts.node
    write_checkpoint(tmp_path / "models")
    pictures = tmp_path / "input" / "squares"
    pictures.mkdir(parents=True)
    for colour in SQUARES:
        Image.new("RGB", (96, 80), colour).save(pictures / f"{colour}.png")
        (pictures / f"{colour}.txt").write_text(f"a {colour} square")
    distil = node(
        "FlashDistillHeadless",
        **{"model": "checkpoints/small_sd15.safetensors", "config": "small_sd15", "dataset": "squares", "prompts": ""},
        **{"name": "mine/squares", "preset": "quick try", "resolution": 64, "guidance": 0.0, "seed": 0},
        **{"action": "run and wait", "updates": UPDATES, "trajectories": 2, "at_once": 2, "preview_every": EVERY},
    )
    with runtime.serve(tmp_path) as server, Client(server) as client:
        run = client.run({"distil": distil, "picture": node("PreviewImage", images=["distil", 1])})
        assert run.succeeded, run.error
        assert client.images(run, "picture")
        loaded = client.run(
            {
                "model": node("CheckpointLoaderSimple", ckpt_name="small_sd15.safetensors"),
                "lora": node("FlashLoraLoader", model=["model", 0], lora_name="mine/squares.safetensors", strength=1.0),
                "report": node("PreviewAny", source=["lora", 1]),
            }
        )
        assert loaded.succeeded, loaded.error
    (report,) = loaded.outputs["report"]["text"]
    (folder,) = (tmp_path / "output" / "flash_distill_headless").glob("mine-squares-*")
    with safe_open(folder / "lora.safetensors", framework="pt") as file:
        layers = sum(name.endswith(".lora_down.weight") for name in file.keys())  # noqa: SIM118  no mapping
    assert layers
    assert f"matched: {layers}/{layers}" in report
