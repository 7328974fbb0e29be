"""One LoRA file and one seed give the same latents and the same picture in diffusers and in ComfyUI.

ComfyUI makes a batch of two. Its first picture equals diffusers' single picture. Its second picture has its own noise,
and equals the picture that ComfyUI makes of this item alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from . import prompts
from .client import Client
from .loras import TIMESTEPS, save_random_lora

pytestmark = pytest.mark.comfy

SEED = 1234
PICTURES = 2
TOLERANCE = 1e-3  # of the latents' standard deviation


@pytest.fixture(scope="module")
def lora(server) -> Path:
    """Save a LoRA with random weights for ComfyUI; tests try the shipped LoRA too."""
    path = server.base / "models" / "loras" / "random_flash.safetensors"
    save_random_lora(path, prompts.TEACHER)
    return path


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """Make a stock pipeline of the demo's teacher with diffusers' few-step scheduler."""
    stock = StableDiffusionPipeline.from_pretrained(prompts.TEACHER, torch_dtype=torch.float32, safety_checker=None)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    return stock


def diffusers_run(pipeline: StableDiffusionPipeline, lora: Path | None, steps: int, output: str) -> Tensor:
    """Run a stock pipeline at the trained timesteps, without guidance, with noise from one generator."""
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    try:
        return pipeline(
            prompts.PROMPT,
            height=128,
            width=128,
            timesteps=[int(t) for t in TIMESTEPS[steps]],
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(SEED),
            output_type=output,
        ).images
    finally:
        pipeline.unload_lora_weights()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.std()) <= TOLERANCE


def shipped_loras() -> list[Path]:
    """All but face-swap's, which changes a first layer with more channels than the plain model's."""
    found = sorted((prompts.ROOT / "trainer" / "demo" / "lora").glob("*.safetensors"))
    return [path for path in found if path.stem != "flash_demo_face_swap"]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_flash_sampler_equals_diffusers(client: Client, lora: Path, pipeline, steps: int) -> None:
    run = client.run(prompts.latents(lora.name, seed=SEED, steps=steps, pictures=PICTURES))
    assert run.succeeded, run.error
    expected = diffusers_run(pipeline, lora, steps, "latent") / pipeline.vae.config.scaling_factor
    assert_close(client.latent(run, "latent")[:1], expected)


def test_the_second_picture_of_a_batch_equals_the_picture_made_alone(client: Client, lora: Path) -> None:
    batch = client.run(prompts.latents(lora.name, seed=SEED, pictures=3))
    assert batch.succeeded, batch.error
    alone = prompts.latents(lora.name, seed=SEED, pictures=3)
    alone["item"] = prompts.node("LatentFromBatch", samples=[prompts.EMPTY, 0], batch_index=1, length=1)
    alone[prompts.SAMPLER]["inputs"]["latent_image"] = ["item", 0]
    run = client.run(alone)
    assert run.succeeded, run.error
    assert_close(client.latent(run, "latent"), client.latent(batch, "latent")[1:2])


@pytest.mark.parametrize("shipped", shipped_loras(), ids=lambda path: path.stem)
def test_the_shipped_lora_equals_diffusers(client: Client, pipeline, shipped: Path) -> None:
    run = client.run(prompts.latents(shipped.name, seed=SEED, pictures=PICTURES))
    assert run.succeeded, run.error
    expected = diffusers_run(pipeline, shipped, 4, "latent") / pipeline.vae.config.scaling_factor
    assert_close(client.latent(run, "latent")[:1], expected)


def test_one_lora_file_gives_the_same_picture_everywhere(client: Client, lora: Path, pipeline) -> None:
    ours = prompts.latents(lora.name, seed=SEED, pictures=PICTURES)
    core = prompts.latents(lora.name, seed=SEED, pictures=PICTURES)
    core[prompts.LORA] = prompts.node(
        "LoraLoaderModelOnly", model=[prompts.MODELS, 0], lora_name=lora.name, strength_model=1.0
    )
    expected = np.asarray(diffusers_run(pipeline, lora, 4, "pil")[0], dtype=int)
    for prompt in (ours, core):
        run = client.run(prompt)
        assert run.succeeded, run.error
        picture = np.asarray(client.images(run, prompts.SAVE)[0], dtype=int)
        # One level of 255: the two round the same value to the nearest and downward.
        assert np.abs(picture - expected).max() <= 1


def test_the_lora_changes_the_picture(client: Client, lora: Path) -> None:
    with_lora = client.run(prompts.latents(lora.name, seed=SEED, pictures=PICTURES))
    without = client.run(prompts.latents(None, seed=SEED, pictures=PICTURES))
    off = prompts.latents(lora.name, seed=SEED, pictures=PICTURES)
    off[prompts.LORA]["inputs"]["strength"] = 0.0
    plain, patched = client.latent(without, "latent"), client.latent(with_lora, "latent")
    assert float((plain - patched).abs().max() / plain.std()) > 0.1
    assert torch.equal(client.latent(client.run(off), "latent"), plain)


def test_lora_strength_scales_as_in_core(client: Client, lora: Path) -> None:
    ours = prompts.latents(lora.name, seed=SEED)
    ours[prompts.LORA]["inputs"]["strength"] = 0.5
    core = prompts.latents(lora.name, seed=SEED)
    core[prompts.LORA] = prompts.node(
        "LoraLoaderModelOnly", model=[prompts.MODELS, 0], lora_name=lora.name, strength_model=0.5
    )
    assert_close(client.latent(client.run(ours), "latent"), client.latent(client.run(core), "latent"))
