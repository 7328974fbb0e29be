"""Presets: every family and size from model and data alone, the user's own fields above them, reasons in words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from rich.console import Console
from safetensors.torch import save_file

from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.trainer.demo.assets import GLYPHS, ROOT
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.distill.plan import print_plan
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import load_recipe, preset_names, read_recipe
from flash_diffusion.trainer.recipes.preset import between, in_words
from flash_diffusion.trainer.recipes.size import data_size, model_size
from flash_diffusion.trainer.teachers import FAMILIES, family

# The digests of the shipped recipes when they still held every field themselves.
DIGESTS = {
    "controlnet_sd15": "8d97281c5cefa194",
    "controlnet_sdxl": "7b2ac9a2beef27f9",
    "face_swap": "8c6f63ec5b907417",
    "inpainting_sd15": "23ccda3c9c937997",
    "inpainting_sdxl": "e0c1bc2791db4340",
    "pixart": "f3c5041aa7bad96c",
    "pixart_sigma": "34109b54d7cac9fc",
    "sd15": "018ed0b56e2da7a0",
    "sd21": "e109116aa0557d59",
    "sd3": "27215ce014f99058",
    "sd35": "93e3a70d56a6d534",
    "sdxl": "2db1dc856f9cfd4c",
    "super_resolution_sd15": "734585bc00c90b68",
    "t2i_adapter_sdxl": "e3c7ed4412c4c583",
    "upscaler_x4": "4b70790b5c1ad2ad",
}
FLOWS = {"sd3", "sd35"}


def own(folder: Path, **sections: Any) -> str:
    """Write a recipe of a user's own and return its path."""
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(sections))
    return str(path)


@pytest.mark.parametrize("name", DIGESTS)
def test_shipped_recipes_are_what_they_were_without_a_preset(name: str) -> None:
    assert load_recipe(name).digest().startswith(DIGESTS[name])


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("name", FAMILIES)
def test_model_data_and_preset_are_a_whole_recipe(preset: str, name: str, tmp_path: Path) -> None:
    model = {"family": name} | ({} if name == "demo" else {"path": "owner/model"})
    recipe, reasons = read_recipe(own(tmp_path, model=model, data={"source": "demo"}, preset=preset))
    assert (recipe.method.solver == "euler") == (name in FLOWS)
    assert (recipe.model.dtype, recipe.precision) == (("float32", "no") if name == "demo" else ("bfloat16", "bf16"))
    if name in {"pixart_alpha", "pixart_sigma", *FLOWS}:
        assert recipe.lora.targets == list(family(name).default_targets)
    assert reasons[0].startswith(f"preset {preset}: ")
    assert sum(round(phase.updates) for phase in recipe.phases) == recipe.updates >= 100


def test_values_between_two_sizes_are_linear_in_logarithms() -> None:
    rates = {5e6: 4e-3, 8.6e8: 1e-4, 2.6e9: 5e-5}
    assert between(rates, 5e6) == between(rates, 1e5) == 4e-3
    assert between(rates, 2.6e9) == between(rates, 1e11) == 5e-5
    middle = math.sqrt(5e6 * 8.6e8)
    assert between(rates, middle) == pytest.approx(math.sqrt(4e-3 * 1e-4), rel=0.05)
    assert between({1e6: 8, 1e8: 128}, 1e7) == 32
    assert between({1e6: 1, 1e8: 16}, 1e7) == 4
    assert in_words(6_700_000) == "6.7 M"
    assert in_words(2.57e9) == "2.57 B"


@pytest.mark.parametrize(
    ("parameters", "least", "most", "ranks"),
    [
        (1.5e6, 1e-3, 2e-3, (32, 40)),
        (7e6, 1e-3, 2e-3, (32, 40)),
        (8.6e8, 1e-5, 1e-4, (64, 128)),
        (2.6e9, 1e-5, 1e-4, (64, 128)),
    ],
)
def test_rates_and_ranks_of_best_suit_the_size(
    parameters: float,
    least: float,
    most: float,
    ranks: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flash_diffusion.trainer.recipes.preset.model_size", lambda model: (parameters, "given"))
    recipe = load_recipe(own(tmp_path, model={"family": "sd15", "path": "x"}, data={"source": "demo"}, preset="best"))
    assert least <= recipe.optimizer.lr <= most
    assert ranks[0] <= recipe.lora.rank <= ranks[1]
    assert recipe.model.dtype == ("float32" if parameters < 1e8 else "bfloat16")
    assert recipe.gradient_checkpointing == (parameters > 1e9)


def test_a_models_size_is_read_from_the_headers_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    tensors = {"a": torch.zeros(10, 20), "b": torch.zeros(5)}
    for name in ("unet/diffusion_pytorch_model", "unet/diffusion_pytorch_model.fp16", "vae/model"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert model_size({"family": "sd15", "path": str(tmp_path)})[0] == 205
    single = tmp_path / "one.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(7), "first_stage_model.y": torch.zeros(9)}, single)
    assert model_size({"family": "sd15", "path": str(single)})[0] == 7
    single.write_bytes(b"broken")
    assert model_size({"family": "sdxl", "path": str(single)}) == (2.57e9, "usual for SDXL")


def test_the_size_of_an_embedded_teacher_is_counted() -> None:
    """The second teacher is not as large as the first, which is usual for the family."""
    for path, home in ((None, ROOT), ("glyphs", GLYPHS)):
        unet = UNet2DConditionModel.from_pretrained(home / "teacher", subfolder="unet")
        assert model_size({"family": "demo", "path": path})[0] == pytest.approx(unet.num_parameters(), rel=0.01)


def test_the_number_of_samples_is_counted_without_reading_them(tmp_path: Path, pictures: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\nthree\n")
    assert data_size({"source": "folder", "path": str(pictures)})[0] == 6
    assert data_size({"source": "prompts", "path": str(prompts)})[0] == 3
    assert data_size({"source": "prompts", "path": str(prompts), "limit": 2})[0] == 2
    assert data_size({"source": "demo"})[0] == 300
    assert data_size({"source": "webdataset", "path": "https://host/shard-{0..9}.tar"})[0] is None


def test_fields_and_overrides_of_the_user_stand_above_the_preset_and_are_named(tmp_path: Path) -> None:
    path = own(
        tmp_path, model={"family": "demo"}, data={"source": "demo"}, preset="best", lora={"rank": 12}, batch_size=16
    )
    recipe, reasons = read_recipe(path, ["phases.1.updates=7", "trajectories.count=320", "optimizer.lr=1e-3"])
    assert (recipe.lora.rank, recipe.phases[1].updates, recipe.trajectories.count) == (12, 7, 320)
    assert recipe.phases[0].updates == 140  # 70 % of 10 x 320 / 16
    text = "\n".join(reasons)
    assert "lora.rank: the recipe's own, instead of the preset's 32" in text
    assert "updates: 200: each of 320 trajectories 10 times, 16 an update" in text
    assert read_recipe(path, [], "paper")[0].phases[0].name == "warm-up"  # the option takes the preset's place
    small = "\n".join(read_recipe(path, [], "paper")[1])
    assert "published for models of 600 M parameters and more; see preset best" in small
    with pytest.raises(UserError, match="there is no preset 'bset'; expected one of best, paper, tdm"):
        read_recipe(path, ["preset=bset"])
    with pytest.raises(UserError, match="got 0 trajectories"):
        read_recipe(path, ["trajectories.count=0"])


def test_the_plan_says_what_the_preset_chose(tmp_path: Path) -> None:
    recipe, reasons = read_recipe(own(tmp_path, model={"family": "demo"}, data={"source": "demo"}, preset="best"))
    console = Console(record=True, width=200, file=(tmp_path / "plan.txt").open("w"))
    print_plan(recipe, console, reasons)
    text = console.export_text()
    assert "preset best: what helped on small models" in text
    assert "optimizer.lr: 0.0017, by the model's size (0.002 at 5 M, 0.0001 at 860 M, 5e-05 at 2.6 B)" in text
    assert "trajectories.count: 3072: 2 for each of 300 samples (counted), from 3072 to 8192" in text


def test_best_distils_a_small_model_of_ones_own(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    """Only the budget is cut."""
    path = own(
        tmp_path,
        model={"family": "sd15", "path": str(tiny_model)},
        data={"source": "folder", "path": str(pictures)},
        preset="best",
    )
    budget = ["trajectories.count=4", "batch_size=2", "phases.0.updates=1", "phases.1.updates=1"]
    recipe = load_recipe(path, [*budget, "method.discriminator.warmup=1", "preview.steps=[1]"])
    file = read_lora(distil(recipe, tmp_path / "run"))
    assert file.ranks == (32,)
    assert file.metadata is not None
    assert file.metadata.stochasticity[4] == 0.5


def test_tdm_distils_from_prompts_alone(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture is drawn first, and no solution of the teacher is asked for while it trains."""
    (tmp_path / "prompts.txt").write_text("red ball\ngreen box\nblue cone\n")
    path = own(
        tmp_path,
        model={"family": "sd15", "path": str(tiny_model)},
        data={"source": "prompts", "path": str(tmp_path / "prompts.txt")},
        preset="tdm",
    )
    asked: list[int] = []
    monkeypatch.setattr(Distiller, "teacher_solution", lambda *arguments, **options: asked.append(1))
    budget = ["batch_size=2", "phases.0.updates=2", "method.critic.warmup=1", "method.teacher_steps=4"]
    recipe = load_recipe(path, [*budget, "preview.steps=[1]", "log_every=1"])
    assert not recipe.reads_pictures
    file = read_lora(distil(recipe, tmp_path / "run"))
    assert not asked
    assert file.metadata is not None
    assert file.metadata.stochasticity[4] == 0
    terms = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [{"dmd", "critic"} <= set(line) for line in terms] == [True, True, False]  # the last line is the preview's
    assert "distillation" not in terms
