"""Flash Distill Headless: models it knows, paths that stay in their folders, and recipes that the trainer accepts."""

from __future__ import annotations

import json
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flash_diffusion.trainer.recipes import load_recipe

from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

UNET = "model.diffusion_model."
FIRST, TEXT = "input_blocks.0.0.weight", "input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
# Some tensors' names and shapes as they are in published files.
FILES: dict[str, dict[str, tuple[int, ...]]] = {
    "checkpoints/sd15": {UNET + FIRST: (320, 4, 3, 3), UNET + TEXT.format(1): (320, 768)},
    "checkpoints/sd21": {UNET + FIRST: (320, 4, 3, 3), UNET + TEXT.format(1): (320, 1024)},
    "checkpoints/sdxl": {UNET + FIRST: (320, 4, 3, 3), UNET + TEXT.format(4): (640, 2048)},
    "checkpoints/inpainting": {UNET + FIRST: (320, 9, 3, 3), UNET + TEXT.format(1): (320, 768)},
    "checkpoints/refiner": {UNET + FIRST: (384, 4, 3, 3), UNET + TEXT.format(4): (768, 1280)},
    "checkpoints/sd35_large": {
        f"{UNET}x_embedder.proj.weight": (2432, 16, 2, 2),
        f"{UNET}joint_blocks.0.x_block.attn.ln_q.weight": (64,),
    },
    "diffusion_models/sd3": {
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
    },
    "diffusion_models/unet": {FIRST: (320, 4, 3, 3), TEXT.format(1): (320, 768)},
    "diffusion_models/flux": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
}
FOLDERS: dict[str, dict[str, Any]] = {
    "pixart": {"model_index.json": {"_class_name": "PixArtAlphaPipeline"}},
    "kandinsky": {"model_index.json": {"_class_name": "KandinskyPipeline"}},
    "sdxl": {
        "model_index.json": {"_class_name": "StableDiffusionXLPipeline"},
        "unet/config.json": {"in_channels": 4, "cross_attention_dim": 2048},
    },
    "sd3": {"model_index.json": {"_class_name": "StableDiffusion3Pipeline"}, "transformer/config.json": {}},
    "half": {"model_index.json": {"_class_name": "StableDiffusionPipeline"}},
}
PRESETS = {"quick try": (100, 128), "standard": (300, 512), "thorough": (7, 5)}  # updates, trajectories


def write_models(models: Path) -> None:
    """Write small stand-ins of files and folders."""
    for name, shapes in FILES.items():
        path = models / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: torch.empty(shape, dtype=torch.float8_e5m2) for key, shape in shapes.items()}, path)
    (models / "checkpoints" / "broken.safetensors").write_bytes(b"no tensors")
    for name, files in FOLDERS.items():
        for file, content in files.items():
            path = models / "diffusers" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base directory with models, a dataset, links that lead out of it, and a Python without packages."""
    base = tmp_path_factory.mktemp("headless") / "base"
    write_models(base / "models")
    for folder in ("output", "custom_nodes", "input/pictures", "models/loras", "../elsewhere"):
        (base / folder).mkdir(parents=True)
    (base.parent / "secret.safetensors").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(base / "input" / "pictures" / "1.png")
    (base / "input" / "pictures" / "1.txt").write_text("a caption")
    for folder in ("input", "models/loras"):
        (base / folder / "linked").symlink_to(base.parent / "elsewhere")
    venv.create(base / "empty")
    return base


@pytest.fixture(scope="module")
def facts(runtime: ModuleType, base: Path) -> dict[str, Any]:
    """Run the script in ComfyUI's process and return its facts."""
    # A new process: the script names ComfyUI's base directory, which counts only before the imports.
    return json.loads(run_inside(runtime, "headless_inputs.py", base, fresh=True).splitlines()[-1])


def test_models_are_recognised_or_the_reason_is_told(facts) -> None:
    families = {name: told for name, told in facts["models"].items() if not told.startswith("refused")}
    assert families == {
        "Flash demo": "demo",
        "checkpoints/sd15.safetensors": "sd15",
        "checkpoints/sd21.safetensors": "sd21",
        "checkpoints/sdxl.safetensors": "sdxl",
        "checkpoints/sd35_large.safetensors": "sd35",
        "diffusion_models/sd3.safetensors": "sd3",
        "diffusers/pixart": "pixart_alpha",
        "diffusers/sdxl": "sdxl",
        "diffusers/sd3": "sd3",
    }
    refused = {name: told for name, told in facts["models"].items() if told.startswith("refused")}
    for name, words in {
        "checkpoints/inpainting.safetensors": "reads 9 channels",
        "checkpoints/refiner.safetensors": "reads text 1280 wide",
        "checkpoints/broken.safetensors": "no readable safetensors file",
        "diffusion_models/unet.safetensors": "a UNet without the rest of its checkpoint",
        "diffusion_models/flux.safetensors": "connect it to Flash Distill",
        "diffusers/kandinsky": "is a KandinskyPipeline",
        "diffusers/half": "config.json cannot be read",
    }.items():
        assert words in refused.pop(name)
    assert not refused


def test_no_path_leaves_its_folder(facts, base: Path) -> None:
    assert all(told.startswith("refused: There is no model") for told in facts["no models"].values())
    assert facts["no config"].startswith("refused: There is no folder '../diffusers/pixart'")
    assert facts["datasets"] == ["linked", "pictures"]
    told = facts["no datasets"]
    assert "leads out of" in told.pop("linked")
    assert all(words.startswith("refused: There is no folder") for words in told.values())
    assert all(told.startswith("refused: The name") for told in facts["names"].values())
    assert Path(facts["folder"]).parent == base / "output" / "flash_distill_headless"
    assert Path(facts["folder"]).name.startswith("mine-my-flash-")
    assert "is a link that leads out of" in facts["runs elsewhere"]


def test_fields_in_the_trainers_errors_are_named_as_inputs(facts) -> None:
    assert facts["inputs"] == [
        "In this node model.config is the input 'config'.",
        "In this node data.resolution is the input 'resolution', batch_size is the input 'at_once'.",
        "",
    ]


def test_the_same_inputs_and_files_are_the_same_run(facts) -> None:
    assert len({*facts["same"], *facts["other"]}) == 3
    assert len(set(facts["same"])) == 1


def test_the_trainer_accepts_every_recipe(facts, base: Path) -> None:
    recipes = {path.parent.name: load_recipe(str(path)) for path in base.glob("recipes/*/recipe.yaml")}
    for preset, (updates, trajectories) in PRESETS.items():
        recipe = recipes.pop(preset)
        assert (recipe.updates, recipe.trajectories.count) == (updates, trajectories)
        assert recipe.data.path == base / "recipes" / preset / "prompts.txt"
        assert recipe.data.path.read_text(encoding="utf-8").splitlines() == recipe.preview.prompts
        assert recipe.data.cache == base / "recipes" / "cache"
        # The error alone, then distribution matching on the first step: demo's factors, best's rate and modes.
        assert [phase.updates for phase in recipe.phases] == [updates - round(0.3 * updates), round(0.3 * updates)]
        last, demo, best = recipe.phases[1], load_recipe("demo").phases[1], recipes["best"].phases[1]
        assert (last.dmd, last.first_step_distillation) == (demo.dmd, demo.first_step_distillation)
        assert (last.learning_rate, last.modes) == (best.learning_rate, best.modes)
        assert not recipe.phases[0].dmd
        if preset == "standard":
            assert (recipe.lora.rank, recipe.optimizer.lr, recipe.batch_size) == (4, 1e-5, 3)
            assert (recipe.data.resolution, recipe.method.guidance) == (256, (5, 5))
    dataset = recipes.pop("dataset")
    assert (dataset.data.source, dataset.data.path) == ("folder", base / "input" / "pictures")
    assert dataset.model.path == str(base / "models" / "checkpoints" / "sd15.safetensors")
    for preset, recipe in recipes.items():
        plain = {"model": {"family": "demo"}, "data": {"source": "prompts", "path": str(recipe.data.path)}}
        path = base / f"{preset}.yaml"
        path.write_text(json.dumps({**plain, "preset": preset}))
        assert load_recipe(str(path)).phases == recipe.phases
    assert set(recipes) == {"best", "tdm", "paper"}
    assert facts["no prompts"].startswith("refused: There is no prompt. Write prompts, one a line, or choose a dataset")
    assert facts["no updates"].startswith("refused: updates is 5, but the preset paper decides it")


def test_a_run_that_is_queued_while_the_queue_ends_gets_a_new_queue(facts) -> None:
    assert facts["queue that ends"] == ["flash_distill_headless"]


def test_a_run_is_not_removed_while_a_trainer_works_in_it(facts) -> None:
    assert facts["removed at work"].startswith("refused: A trainer is still at work in ")
    told, left = facts["removed"]
    assert told.startswith("orphan is removed: ")
    assert not left


def test_missing_packages_are_told_with_pips_command(facts) -> None:
    assert facts["packages"] == "None"
    told = facts["empty python"]
    assert "pip install" in told
    assert all(f'"{name}' in told for name in ("peft", "pydantic", "diffusers", "accelerate"))
    assert "FLASH_DIFFUSION_PYTHON" in told
    assert "Traceback" not in told
    assert "cannot be started: No such file or directory" in facts["no python"]
