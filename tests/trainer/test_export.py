"""Exported files work in diffusers, and their header reads back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from flash_diffusion.flash_core.denoiser import predict_z0
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.lora import FlashMetadata, read_lora
from flash_diffusion.flash_core.process import FlowProcess, VPProcess
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill.export_command import export_checkpoint
from flash_diffusion.trainer.distill.loop import Run, distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.export.base_facts import read_base_facts, write_base_facts
from flash_diffusion.trainer.teachers import family, load_teacher, outline_teacher

from ..families.pipelines import save_pipeline
from .models import tiny_recipe


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


# -- the base, hours later ---------------------------------------------------------------------------------------------


def content_of(path: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    """A file's header and tensors; safetensors writes the header's strings in any order."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).flatten().tolist() for name in file.keys()}  # noqa: SIM118
        return file.metadata(), tensors


def test_an_export_needs_the_base_no_more(
    recipe_content: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    recipe_content["model"]["path"] = str(base)
    recipe_content["phases"] = recipe_content["phases"][:1]

    def gone(*_: object) -> None:
        raise AssertionError("the base was read again")

    with monkeypatch.context() as patched:
        patched.setattr("flash_diffusion.trainer.export.base_facts.outline_teacher", gone)
        lora = distil(parse_recipe(recipe_content), tmp_path / "run")
    card = lora.with_name("README.md")
    first = content_of(lora), card.read_bytes()
    shutil.rmtree(base)
    export_checkpoint(tmp_path / "run")
    assert (content_of(lora), card.read_bytes()) == first
    facts = tmp_path / "run" / "base.json"
    facts.write_text('{"name": 3}')
    with pytest.raises(UserError, match=r"base\.json can't be read: .* delete it"):
        export_checkpoint(tmp_path / "run")
    facts.unlink()  # as in runs of earlier versions
    with pytest.raises(UserError, match=r"model\.path: .*base does not exist"):
        export_checkpoint(tmp_path / "run")
    shutil.copytree(tiny_model, base)
    export_checkpoint(tmp_path / "run")
    assert (content_of(lora), card.read_bytes()) == first


@pytest.mark.parametrize(
    ("family", "scheduler"), [("sd15", {}), ("sd21", {}), ("sd15", {"prediction_type": "sample"}), ("sd3", {})]
)
def test_facts_of_the_base_are_read_back_exactly(family: str, scheduler: dict[str, Any], tmp_path: Path) -> None:
    save_pipeline(family, tmp_path / "model", **scheduler)
    content = tiny_recipe(tmp_path / "model", tmp_path)
    content["model"]["family"] = family
    recipe = parse_recipe(content)
    outline = outline_teacher(recipe.model)
    write_base_facts(tmp_path, recipe, outline)
    process, read = outline.denoiser.process, read_base_facts(tmp_path, recipe).process
    assert read_base_facts(tmp_path, recipe).name == "model"
    assert (read.kind, read.prediction) == (process.kind, process.prediction)
    t = torch.linspace(0, 999, 1000).round()
    for ours, theirs in zip(read.alpha_sigma(t), process.alpha_sigma(t), strict=True):
        assert torch.equal(ours, theirs)
    for steps in range(1, 9):
        assert trailing_timesteps(read, steps) == trailing_timesteps(process, steps)


# The names are the public ModelSpec's; widths and predictions those of the published configurations.
MMDIT = {"attention_head_dim": 64}
FLOW = FlowProcess(3.0)
ARCHITECTURES = {
    "sd15": ({}, VPProcess.from_betas(), "stable-diffusion-v1"),
    "sd21-v": ({}, VPProcess.from_betas(prediction="v_prediction"), "stable-diffusion-v2-768-v"),
    "sd21-base": ({}, VPProcess.from_betas(), "stable-diffusion-v2-512"),
    "sd21-other": ({}, VPProcess.from_betas(prediction="sample"), "stable-diffusion-v2"),
    "sdxl": ({}, VPProcess.from_betas(), "stable-diffusion-xl-v1-base"),
    "sd3": ({**MMDIT, "num_attention_heads": 24}, FLOW, "stable-diffusion-v3-medium"),
    "sd35-medium": ({**MMDIT, "num_attention_heads": 24}, FLOW, "stable-diffusion-v3.5-medium"),
    "sd35-large": ({**MMDIT, "num_attention_heads": 38}, FLOW, "stable-diffusion-v3.5-large"),
    "sd35-other": ({**MMDIT, "num_attention_heads": 2}, FLOW, "stable-diffusion-v3.5"),
}


@pytest.mark.parametrize(("model", "facts"), ARCHITECTURES.items(), ids=ARCHITECTURES)
def test_the_architecture_is_that_of_the_model(
    model: str, facts: tuple[dict[str, int], Any, str], tmp_path: Path
) -> None:
    config, process, expected = facts
    found = family(model.partition("-")[0]).architecture(config, process)
    assert found == expected
    metadata = FlashMetadata(
        model.partition("-")[0], process.prediction, process.kind, {1: (999.0,)}, architecture=found
    )
    header = metadata.to_header()
    assert header["modelspec.architecture"] == f"{expected}/lora"
    read = FlashMetadata.from_header(header)
    assert read is not None
    assert read.to_header() == header  # as `flash-diffusion lora convert` writes it again


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_runs_files_have_the_permissions_of_any_new_file(
    recipe_content: dict[str, Any], tmp_path: Path, mask: int
) -> None:
    recipe_content["phases"] = [{**recipe_content["phases"][0], "updates": 1}]
    before = os.umask(mask)
    try:
        lora = distil(parse_recipe(recipe_content), tmp_path / "run")
        for dialect in ("kohya", "diffusers", "peft"):
            name = dialect if dialect == "peft" else f"{dialect}.safetensors"
            assert main(["lora", "convert", str(lora), str(tmp_path / "run" / name), "--to", dialect]) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and "lock" not in path.name]
    assert {"lora.safetensors", "README.md", "config.yaml", "base.json", "adapter_config.json"} <= {
        path.name for path in files
    }
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~mask) for path in files
    }
