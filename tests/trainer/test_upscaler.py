"""The x4 upscaler as a teacher: diffusers' own rollout, training, a LoRA that stock diffusers loads, single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, StableDiffusionUpscalePipeline
from PIL import Image

from flash_diffusion.flash_core.denoiser import predict_z0
from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings
from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.trainer.config import ModelSection, TaskSection, parse_recipe
from flash_diffusion.trainer.data.framing import to_tensor
from flash_diffusion.trainer.distill.loop import Run
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.single_file import save_single_file
from ..families.upscaler import save_upscaler
from .models import tiny_recipe

PROMPTS = ["red ball", "a yellow star"]
TASK = {"reads": "pixels", "scale": 4, "noise_level": [0, 350], "blur": [0, 0], "noise": [0, 0], "jpeg": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_upscaler(tmp_path_factory.mktemp("upscaler") / "x4")


def load(path: Path, **fields: Any) -> Teacher:
    return load_teacher(ModelSection(family="sd_x4", path=str(path), **fields))


def stock(folder: Path) -> Any:
    pipeline = StableDiffusionUpscalePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_picture(seed: int = 4) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_the_rollout_is_the_stock_pipelines(folder: Path) -> None:
    teacher = load(folder)
    assert teacher.latent_shape == (4, 16, 16)
    assert teacher.resolution == (64, 64)
    task = build_task(TaskSection(name="super-resolution", options=TASK))
    pipeline = stock(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    start = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    picture = small_picture()
    drawn = {
        "small": to_tensor(picture, (16, 16)).expand(2, -1, -1, -1),
        "noise_level": torch.full((2,), 120),
        # The pipeline's one draw of its generator, where the latents are given, is the noise of its input.
        "noise": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)),
    }
    conditioning = teacher.encode_prompts(PROMPTS).joined(task.encode(drawn, teacher))
    ours = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=8)).teacher_solution(
        start, conditioning, task.unconditional(conditioning, teacher.unconditional(2)), torch.full((2,), 4.0)
    )
    theirs = pipeline(
        PROMPTS,
        image=[picture] * 2,
        noise_level=120,
        generator=torch.Generator().manual_seed(7),
        latents=start.clone(),
        num_inference_steps=8,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    # Without decoding, the pipeline's postprocessing takes latents as they are.
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_pixels_are_the_stock_pipelines(folder: Path) -> None:
    teacher, pipeline = load(folder), stock(folder)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.08333).sample
        torch.testing.assert_close(teacher.decode(latents), decoded)
        torch.testing.assert_close(teacher.encode(decoded), pipeline.vae.encode(decoded).latent_dist.mode() * 0.08333)


def test_its_input_is_noised_on_the_models_own_schedule(folder: Path) -> None:
    teacher = load(folder)
    task = build_task(TaskSection(name="super-resolution", options={**TASK, "noise_level": [300, 300]}))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn = task.draw(images, {}, torch.Generator().manual_seed(2))
    assert drawn["small"].shape == (2, 3, 16, 16)
    assert drawn["noise_level"].tolist() == [300, 300]
    noised = task.encode(drawn, teacher).concat
    wanted = stock(folder).low_res_scheduler.add_noise(drawn["small"], drawn["noise"], drawn["noise_level"])
    torch.testing.assert_close(noised, wanted)


def test_five_updates_change_the_lora_alone_and_stock_diffusers_draws_with_it(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    content = tiny_recipe(folder, pictures) | {
        "model": {"family": "sd_x4", "path": str(folder)},
        "task": {"name": "super-resolution", "options": TASK},
        "optimizer": {"lr": 0.02},
    }
    run = Run(parse_recipe(content), tmp_path / "run", Accelerator(), None)
    teacher = run.parts.teacher
    network = teacher.denoiser.network
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    _, conditioning = run.parts.examples.batch(torch.tensor([0, 3]), "cpu")
    lora = run.train()
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {name for name in before if ".lora_" in name}
    metadata = read_lora(lora).metadata
    assert metadata is not None
    assert (metadata.base, metadata.task, metadata.prediction) == ("sd_x4", "super-resolution", "v_prediction")
    assert metadata.timesteps[4] == (999, 749, 499, 249)

    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([999.0, 249.0])
    with torch.no_grad(), run.parts.average.applied(), teacher.denoiser.role("student"):
        trained = teacher.denoiser.predict(z, t, conditioning)
        first = predict_z0(teacher.denoiser, z, t, conditioning)
    assert bool(first.isfinite().all())
    pipeline = stock(folder)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    with torch.no_grad():
        theirs = pipeline.unet(
            torch.cat([z, conditioning.concat], 1),
            t,
            encoder_hidden_states=conditioning.cross_attention,
            class_labels=conditioning.noise_level,
        ).sample
    torch.testing.assert_close(trained, theirs, atol=1e-5, rtol=1e-5)


def test_a_single_file_is_its_folder(folder: Path, tmp_path: Path) -> None:
    file = save_single_file(stock(folder), tmp_path / "x4 upscaler.safetensors")
    teacher, other = load(file, config=str(folder)), load(folder)
    state = other.denoiser.network.state_dict()
    assert teacher.denoiser.network.state_dict().keys() == state.keys()
    for name, value in teacher.denoiser.network.state_dict().items():
        assert torch.equal(value, state[name]), name
    conditions = teacher.encode_prompts(PROMPTS)
    torch.testing.assert_close(conditions.cross_attention, other.encode_prompts(PROMPTS).cross_attention)
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(teacher.decode(latents), other.decode(latents))
    levels = torch.tensor([0.0, 20.0, 350.0])
    for ours, theirs in zip(
        teacher.low_resolution_process.alpha_sigma(levels),  # type: ignore[union-attr]
        other.low_resolution_process.alpha_sigma(levels),  # type: ignore[union-attr]
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_wrong_combinations_raise_a_readable_error(folder: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="does not read the noise level of its input, so it is no x4 upscaler"):
        load(tiny_model)
    images = torch.zeros(1, 3, 64, 64)
    quiet = build_task(TaskSection(name="super-resolution", options={**TASK, "noise_level": None}))
    with pytest.raises(UserError, match=r"noise_level: x4 reads a noise level .* expected \[low, high\].*got None"):
        quiet.conditions(images, load(folder), torch.Generator())
    told = build_task(TaskSection(name="super-resolution", options={**TASK, "reads": "latent"}))
    with pytest.raises(UserError, match=r"reads no noise level of its input; expected null, got \[0, 350\]"):
        told.conditions(images, load_teacher(ModelSection(family="sd15", path=str(tiny_model))), torch.Generator())


def test_the_shipped_recipe_fits_the_model(folder: Path) -> None:
    recipe = load_recipe("upscaler_x4", [f"model.path={folder}", "data.resolution=64"])
    outline = outline_teacher(recipe.model, recipe.data.resolution)
    task = build_task(recipe.task)
    assert outline.latent_shape == (4, 16, 16)
    assert outline.denoiser.network.config["in_channels"] == 4 + task.extra_channels(4)
