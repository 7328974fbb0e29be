"""Exported files work in diffusers, and their header reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, StableDiffusionPipeline

from flash_diffusion.flash_core.denoiser import predict_z0
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill.export_command import export_checkpoint
from flash_diffusion.trainer.distill.loop import Run, distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.teachers import load_teacher


def test_stock_diffusers_loads_it_with_the_same_output(
    recipe_content: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    recipe_content["optimizer"]["lr"] = 0.05  # so that the LoRA does something
    recipe = parse_recipe(recipe_content)
    run = Run(recipe, tmp_path, Accelerator(), None)
    path = run.train()
    teacher = run.parts.teacher
    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999.0, 499.0])
    conditioning = teacher.unconditional(2)
    with torch.no_grad():
        bare = teacher.denoiser.predict(z, t, conditioning)
        with run.parts.average.applied(), teacher.denoiser.role("student"):
            trained = teacher.denoiser.predict(z, t, conditioning)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    with torch.no_grad():
        loaded = pipeline.unet(z, t, encoder_hidden_states=conditioning.cross_attention).sample
    assert not torch.allclose(trained, bare, atol=1e-3)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_cards_way_to_sample_is_ours(
    recipe_content: dict[str, Any], tiny_model: Path, tmp_path: Path, steps: int
) -> None:
    """The pipeline call that the card shows makes the latents of our few-step sampler, from the same generator."""
    recipe_content["optimizer"]["lr"] = 0.05
    recipe_content["phases"] = recipe_content["phases"][:1]
    run = Run(parse_recipe(recipe_content), tmp_path, Accelerator(), None)
    path = run.train()
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    grid = [int(t) for t in trailing_timesteps(run.parts.teacher.denoiser.process, steps)]
    seeded = torch.Generator().manual_seed(5)
    theirs = pipe("red ball", timesteps=grid, guidance_scale=1.0, generator=seeded, output_type="latent").images

    denoiser = run.parts.teacher.denoiser
    conditioning = load_teacher(run.recipe.model).encode_prompts(["red ball"])
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1, 4, 8, 8, generator=generator)
    alphas, sigmas = denoiser.process.alpha_sigma(torch.tensor(grid, dtype=torch.float64))
    with torch.no_grad(), run.parts.average.applied(), denoiser.role("student"):
        ours = few_step_sample(
            lambda z, index: predict_z0(denoiser, z, torch.tensor([float(grid[index])]), conditioning),
            z,
            alphas.tolist(),
            sigmas.tolist(),
            generator_noise(z, generator),
        )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_convolutions_and_feed_forward_layers_can_be_adapted(
    recipe_content: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    recipe_content["lora"]["targets"] = ["to_q", "proj_in", "ff.net.2", "conv1"]
    recipe_content["optimizer"]["lr"] = 0.05
    run = Run(parse_recipe(recipe_content), tmp_path, Accelerator(), None)
    path = run.train()
    z, t = torch.ones(1, 4, 8, 8), torch.tensor([749.0])
    conditioning = run.parts.teacher.unconditional(1)
    with torch.no_grad(), run.parts.average.applied(), run.parts.teacher.denoiser.role("student"):
        trained = run.parts.teacher.denoiser.predict(z, t, conditioning)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    with torch.no_grad():
        loaded = pipeline.unet(z, t, encoder_hidden_states=conditioning.cross_attention).sample
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-5)


def test_the_header_says_how_to_sample(recipe: Recipe, tmp_path: Path) -> None:
    lora = read_lora(distil(recipe, tmp_path))
    assert lora.metadata is not None
    assert (lora.metadata.base, lora.metadata.prediction, lora.metadata.process) == ("sd15", "epsilon", "vp")
    assert lora.metadata.timesteps[4] == (999, 749, 499, 249)
    assert set(lora.metadata.timesteps) == set(range(1, 9))
    assert lora.metadata.recipe_hash == recipe.digest()
    assert lora.metadata.teacher == "tiny"
    assert len(lora.metadata.teacher_hash) == 64
    assert lora.metadata.training["updates"] == "5"
    assert lora.alphas == (8.0,)
    assert lora.ranks == (4,)
    assert lora.alpha_source == "file"


def test_the_card_tells_how_it_was_made_and_how_to_use_it(recipe: Recipe, tmp_path: Path) -> None:
    distil(recipe, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    for part in ("load_lora_weights", "timesteps=[999, 749, 499, 249]", "warm-up", "5 updates", "Rank 4, alpha 8"):
        assert part in card
    assert str(tmp_path) not in card


def test_any_kept_checkpoint_can_be_exported(recipe: Recipe, tmp_path: Path) -> None:
    last = distil(recipe, tmp_path).read_bytes()
    export_checkpoint(tmp_path, 4)
    assert read_lora(tmp_path / "lora.safetensors").metadata.training["updates"] == "4"  # type: ignore[union-attr]
    export_checkpoint(tmp_path)
    assert len((tmp_path / "lora.safetensors").read_bytes()) == len(last)
    with pytest.raises(UserError, match="it has checkpoints of the updates 4, 5"):
        export_checkpoint(tmp_path, 3)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml"):
        export_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml is not readable YAML"):
        export_checkpoint(tmp_path)


def test_the_file_is_stored_as_the_recipe_says(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    recipe_content["lora"]["dtype"] = "float16"
    path = distil(parse_recipe(recipe_content), tmp_path / "run")
    file = read_lora(path)
    assert {half.dtype for module in file.modules.values() for half in (module.down, module.up)} == {torch.float16}
    full = read_lora(
        distil(
            parse_recipe({**recipe_content, "lora": {**recipe_content["lora"], "dtype": "float32"}}), tmp_path / "full"
        )
    )
    for name, module in full.modules.items():
        torch.testing.assert_close(file.modules[name].up.float(), module.up, atol=1e-6, rtol=1e-3)
