"""The demo's models in ComfyUI equal those in diffusers and transformers (random weights of the same layout)."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from .inside_comfyui import relative, run_inside
from .random_teacher import PROMPTS, save_random_teacher

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def pipeline_and_results(
    runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StableDiffusionPipeline, dict[str, Tensor], dict[str, Tensor]]:
    """Return the diffusers pipeline in float32, the inputs, and ComfyUI's outputs."""
    folder = tmp_path_factory.mktemp("teacher")
    save_random_teacher(folder)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "latents": torch.randn(3, 8, 16, 16, generator=generator),
        "timesteps": torch.tensor([999.0, 499.0, 3.0]),
        "context": torch.randn(3, 24, 128, generator=generator),
        "images": torch.rand(2, 128, 128, 3, generator=generator),
    }
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    outputs = folder / "outputs.safetensors"
    run_inside(runtime, "demo_models.py", folder, folder / "inputs.safetensors", outputs)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, inputs, load_file(outputs)


@torch.no_grad()
def test_unet_equals_diffusers(pipeline_and_results) -> None:
    pipeline, inputs, results = pipeline_and_results
    expected = pipeline.unet(inputs["latents"], inputs["timesteps"], encoder_hidden_states=inputs["context"]).sample
    assert relative(results["unet"], expected) < 1e-5


@torch.no_grad()
def test_text_encoder_and_tokenizer_equal_transformers(pipeline_and_results) -> None:
    pipeline, _, results = pipeline_and_results
    for index, prompt in enumerate(PROMPTS):
        expected, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        assert relative(results[f"text.{index}"], expected) < 1e-5, prompt


@torch.no_grad()
def test_vae_equals_diffusers(pipeline_and_results) -> None:
    pipeline, inputs, results = pipeline_and_results
    decoded = (pipeline.vae.decode(inputs["latents"]).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert relative(results["decoded"], decoded) < 1e-4
    encoded = pipeline.vae.encode(inputs["images"].movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert relative(results["encoded"], encoded) < 1e-4


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_core_sampler_equals_diffusers_ddim(pipeline_and_results, sampler: str) -> None:
    """Core's KSampler with guidance on the demo's MODEL equals diffusers' DDIM with the same noise and schedule."""
    pipeline, _, results = pipeline_and_results
    expected = pipeline(
        [PROMPTS[0]] * 2,
        negative_prompt=[""] * 2,
        latents=results["noise"],
        num_inference_steps=8,
        guidance_scale=2.0,
        output_type="latent",
    ).images
    # ComfyUI hands out latents as the VAE takes them, diffusers as the UNet gives them.
    assert relative(results[sampler], expected / pipeline.vae.config.scaling_factor) < 1e-3


def test_preview_colours_have_a_row_for_each_channel(pipeline_and_results) -> None:
    _, _, results = pipeline_and_results
    assert results["rgb_factors"].shape == (8, 3)
    assert bool(torch.isfinite(results["rgb_factors"]).all())


@pytest.mark.parametrize("steps", range(1, 9))
def test_trained_sigmas_are_those_of_the_trailing_timesteps(pipeline_and_results, steps: int) -> None:
    pipeline, _, results = pipeline_and_results
    timesteps = [round(1000 * (steps - index) / steps) - 1 for index in range(steps)]
    if steps == 4:
        assert timesteps == [999, 749, 499, 249]
    alphas_cumprod = pipeline.scheduler.alphas_cumprod[timesteps].double()
    expected = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    assert torch.allclose(results[f"sigmas.{steps}"][:-1].double(), expected, rtol=1e-5)
    assert results[f"sigmas.{steps}"][-1] == 0


def test_half_denoise_keeps_the_lower_half_of_the_trained_sigmas(pipeline_and_results) -> None:
    _, _, results = pipeline_and_results
    assert torch.equal(results["sigmas.half"], results["sigmas.4"][2:])
