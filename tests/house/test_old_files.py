"""Files that version 0.1 wrote still load: LoRAs, recipes, reports, and a run that was killed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.report.build import read_report, write_report

from ..trainer.models import picture_folder, tiny_stable_diffusion

FILES = Path(__file__).resolve().parents[1] / "files"
REPORTS = sorted(path.stem for path in (FILES / "reports").glob("*.json"))
OLD_RECIPES = list(yaml.safe_load_all((FILES / "recipes.yaml").read_text()))


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """Return each layer's update, ``up @ down * scale``, by flat name."""
    return {name: module.up @ module.down * module.scale for name, module in read_lora(path).modules.items()}


@pytest.mark.parametrize("name", ["portable.safetensors", "kohya.safetensors", "diffusers.safetensors", "peft"])
def test_an_old_lora_loads(name: str) -> None:
    file = read_lora(FILES / "loras" / name)
    assert (len(file.modules), file.ranks) == (7, (1,))
    # diffusers' form holds no alpha: the scale is folded into the weights.
    assert (file.alpha_source == "unknown") == (name == "diffusers.safetensors")
    expected = deltas(FILES / "loras" / "portable.safetensors")
    for layer, update in deltas(FILES / "loras" / name).items():
        torch.testing.assert_close(update, expected[layer])
    metadata = file.metadata
    assert (metadata.base, metadata.task, metadata.prediction) == ("sd15", "text-to-image", "epsilon")
    assert (metadata.steps, metadata.guidance, sorted(metadata.timesteps)) == (4, 1.0, [1, 2, 3, 4, 5, 6, 7, 8])
    assert metadata.teacher_hash


def _agrees(old: Any, new: Any, where: str) -> None:
    """Compare every field that the old recipe has; the new one may have more."""
    if isinstance(old, dict):
        assert set(old) <= set(new), where
        for name, value in old.items():
            _agrees(value, new[name], f"{where}.{name}")
    elif isinstance(old, list):
        assert len(old) == len(new), where
        for index, value in enumerate(old):
            _agrees(value, new[index], f"{where}.{index}")
    else:
        assert old == new, where


@pytest.mark.parametrize("content", OLD_RECIPES, ids=lambda old: f"{old['model']['family']} {old['task']['name']}")
def test_an_old_recipe_means_the_same(content: dict[str, Any]) -> None:
    _agrees(content, yaml.safe_load(parse_recipe(content).to_yaml()), "recipe")


def test_a_run_that_was_killed_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The LoRA is that of the run that was not killed, but for the sums' order on another machine."""
    tiny_stable_diffusion(tmp_path / "model")
    picture_folder(tmp_path / "pictures")
    shutil.copytree(FILES / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)  # the recipe names its folders as they lie beside it
    recipe = parse_recipe(yaml.safe_load((FILES / "recipe.yaml").read_text()))
    lora = distil(recipe, Path("run"), resume=True)
    whole = deltas(FILES / "loras" / "portable.safetensors")
    for layer, update in deltas(lora).items():
        assert (update - whole[layer]).norm() < 1e-2 * whole[layer].norm(), layer
    logged = [json.loads(line)["update"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5, 6, 6]  # the last line is that of the preview at the end


def test_the_resumed_updates_matter() -> None:
    """The test above can fail: the checkpoint's own average is not yet the whole run's LoRA."""
    average = checkpoint.read_average(FILES / "run" / "checkpoints" / "00000003")
    whole = load_file(FILES / "loras" / "peft" / "adapter_model.safetensors")
    norms = [sum(float(value.norm()) for name, value in part.items() if "lora_B" in name) for part in (average, whole)]
    assert norms[0] < 0.9 * norms[1]


def test_the_discriminator_has_its_old_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint with other names or shapes would be refused."""
    tiny_stable_diffusion(tmp_path / "model")
    picture_folder(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((FILES / "recipe.yaml").read_text())
    content["phases"] = [{"name": "all", "updates": 1, "modes": [1, 1, 1, 1], "adversarial": 0.3}]
    distil(parse_recipe(content), Path("run"))
    (last,) = checkpoint.checkpoints(Path("run"))
    tensors = load_file(last / checkpoint.TENSORS)
    found = {name: list(value.shape) for name, value in tensors.items() if name.startswith("discriminator/")}
    assert found == json.loads((FILES / "checkpoint_with_discriminator.json").read_text())


@pytest.mark.parametrize("name", REPORTS)
def test_an_old_report_becomes_a_page(name: str, tmp_path: Path) -> None:
    text = (FILES / "reports" / f"{name}.json").read_text(encoding="utf-8")
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    for picture in set(re.findall(r'"(pictures/[^"]+\.(?:webp|png))"', text)):  # only the numbers were kept
        (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / picture)
    assert read_report(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "</html>" in page
