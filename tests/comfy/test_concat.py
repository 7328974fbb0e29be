"""Concat models in the real ComfyUI: channels and latents equal the trainer's; wrong channels raise an error."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning, predict_z0
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.lora import LoraModule
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.flash_core.task_adapter import TaskAdapter, write_task_adapter
from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

EXTRA = 33  # a mask and two pictures' latents of 16
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TOLERANCE = 1e-3  # of the latents' standard deviation


@pytest.fixture(scope="module")
def run(
    runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Teacher, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Run the same random task adapter on the demo's base in the trainer and in ComfyUI."""
    folder = tmp_path_factory.mktemp("concat")
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    module = LoraModule(LAYER, draw(4, 128) * 0.1, draw(128, 4) * 0.1)
    adapter = TaskAdapter("face-swap", draw(64, EXTRA, 3, 3) * 0.05, {"q": module})
    path = folder / "adapter.safetensors"
    write_task_adapter(path, adapter, torch.float32)
    smooth = F.interpolate(torch.rand(2, 3, 8, 8, generator=generator), (128, 128), mode="bilinear")
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 40:100] = 1
    given = {"mask": mask, "image": smooth[:1].movedim(1, -1), "image_2": smooth[1:].movedim(1, -1)}
    save_file({name: value.contiguous() for name, value in given.items()}, folder / "inputs.safetensors")
    outputs = folder / "outputs.safetensors"
    said = run_inside(runtime, "concat.py", path, folder / "inputs.safetensors", outputs)
    teacher = load_teacher(ModelSection(family="demo", task_adapter=str(path)))
    return teacher, given, load_file(outputs), json.loads(said.splitlines()[-1])


@torch.no_grad()
def concat_of(teacher: Teacher, given: dict[str, Tensor]) -> Tensor:
    pictures = [teacher.encode(given[name].movedim(-1, 1) * 2 - 1) for name in ("image", "image_2")]
    return torch.cat([F.interpolate(given["mask"][:, None], (16, 16)), *pictures], dim=1)


def test_channels_equal_the_trainers(run) -> None:
    teacher, given, results, said = run
    expected = concat_of(teacher, given)
    assert results["concat"].shape == (1, EXTRA, 16, 16)
    assert float((results["concat"] - expected).abs().max() / expected.std()) < TOLERANCE
    assert said["report"] == "33 channels: mask 1, image 16, image_2 16"


@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_the_sampled_latent_equals_the_trainers(run, steps: int) -> None:
    teacher, given, results, _ = run
    conditioning = teacher.encode_prompts(["red apple"]).joined(Conditioning(concat=concat_of(teacher, given)))
    timesteps = trailing_timesteps(teacher.denoiser.process, steps)
    alphas, sigmas = teacher.denoiser.process.alpha_sigma(torch.tensor(timesteps))
    generator = torch.Generator().manual_seed(11)
    draw = generator_noise(torch.zeros(1, 16, 16, 16), generator)
    expected = few_step_sample(
        lambda z, index: predict_z0(teacher.denoiser, z, torch.tensor([timesteps[index]]), conditioning),
        draw(),
        alphas.tolist(),
        sigmas.tolist(),
        draw,
    )
    ours = results[f"sampled.{steps}"] * teacher.vae.config.scaling_factor
    assert float((ours - expected).abs().max() / expected.std()) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another order", ["image_2 is connected but not listed"]),
        ("an unknown name", ["'picture' is no input", "image_2"]),
        ("a name twice", ["named twice"]),
        ("nothing", ["No mask, image or latent is connected"]),
        ("too few channels", ["reads 33 channels", "17 are connected", "mask 1, image 16"]),
        ("no concat model", ["reads 0 channels", "It is no concat model"]),
        ("another shape", ["image is 128 x 64", "128 x 128 pixels"]),
        ("three masks", ["3 masks for 1 latent;", "Convert Mask to Image", "Repeat Latent Batch (amount 3)"]),
        ("no VAE", ["no VAE is connected"]),
    ],
)
def test_wrong_channels_raise_a_readable_error(run, case: str, words: list[str]) -> None:
    refusal = run[3]["refusals"][case]
    for word in words:
        assert word in refusal
