"""Picture sizes: what each family takes, and the conditions that tell it a size, as diffusers' pipelines make them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.pipelines import save_pipeline

GRAINS = {"sd15": 8, "sdxl": 8, "pixart_alpha": 16, "pixart_sigma": 16, "sd3": 16, "sd35": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family as a diffusers folder, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = save_pipeline(family, root / family)
        return made[family]

    return model


def load(family: str, path: Path, resolution: int | None = 64) -> Teacher:
    return load_teacher(ModelSection(family=family, path=str(path)), resolution=resolution)


@pytest.mark.parametrize(("family", "grain"), GRAINS.items())
def test_every_multiple_of_the_grain_runs(family: str, grain: int, models: Callable[[str], Path]) -> None:
    teacher = load(family, models(family))
    assert teacher.latent_grain() == grain
    for height, width in ((3 * grain, 5 * grain), (7 * grain, 4 * grain)):
        teacher.check_resolution(height, width)
        with torch.no_grad():
            z = teacher.encode(torch.zeros(1, 3, height, width))
            conditioning = teacher.with_size(teacher.encode_prompts(["red ball"]), (height, width))
            assert teacher.denoiser.predict(z, torch.tensor([500.0]), conditioning).shape == z.shape
    with pytest.raises(UserError, match=rf"{grain // 2 + 2 * grain} x {2 * grain} .* multiple of {grain} pixels, such"):
        teacher.check_resolution(2 * grain, grain // 2 + 2 * grain)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart_alpha", "pixart_sigma", "sd3"])
def test_conditions_of_a_size_are_the_stock_pipelines(
    family: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, (height, width) = load(family, models(family)), (48, 80)
    pipeline: Any = DiffusionPipeline.from_pretrained(models(family), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer if teacher.transformer else pipeline.unet
    given: list[dict[str, Any]] = []
    network.register_forward_pre_hook(lambda _module, _args, kwargs: given.append(kwargs), with_kwargs=True)
    more = {"use_resolution_binning": False, "clean_caption": False} if family.startswith("pixart") else {}
    pipeline("red ball", height=height, width=width, num_inference_steps=2, output_type="latent", **more)
    added = given[0].get("added_cond_kwargs") or {}
    if "time_ids" in added:
        expected = added["time_ids"][-1]
    elif added.get("resolution") is not None:
        expected = torch.cat([added["resolution"][-1], added["aspect_ratio"][-1]])
    else:
        expected = None
    assert (expected is not None) == (family in ("sdxl", "pixart_alpha"))
    for conditioning in (teacher.encode_prompts(["red ball", "green box"]), teacher.unconditional(2)):
        sized = teacher.with_size(conditioning, (height, width))
        if expected is None:
            assert sized is conditioning
        else:
            assert sized.size_ids is not None
            torch.testing.assert_close(sized.size_ids, expected.float().expand(2, -1))
            assert sized.cross_attention is conditioning.cross_attention
            for other in (sized, replace(sized, size_ids=None)):
                again = teacher.with_size(other, teacher.resolution)
                assert torch.equal(again.size_ids, conditioning.size_ids)  # type: ignore[arg-type]


def test_a_size_above_the_positions_raises_a_readable_error(models: Callable[[str], Path]) -> None:
    """The stand-in has 24 x 24 positions of 16 pixels: 384."""
    teacher = load("sd3", models("sd3"), 384)
    model = ModelSection(family="sd3", path=str(models("sd3")))
    for call in (load_teacher, outline_teacher):
        with pytest.raises(UserError, match=r"data\.resolution: 400 is above the 384 pixels .* expected at most 384"):
            call(model, resolution=400)
    with pytest.raises(UserError, match=r"data\.resolution: 400 x 64 is above the 384"):
        teacher.check_resolution(64, 400)


def test_a_model_without_a_size_asks_for_one(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models("sd15"), tmp_path / "model")
    config = folder / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "sample_size": None}))
    for call in (load_teacher, outline_teacher):
        with pytest.raises(UserError, match=r"data\.resolution: is missing, and model has no size"):
            call(ModelSection(family="sd15", path=str(folder)))
    assert load("sd15", folder, 48).resolution == (48, 48)


def test_a_size_far_from_the_models_own_is_told(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models("sd15"), tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": 2}))
    model = ModelSection(family="sd15", path=str(folder))
    warning = outline_teacher(model, 512).size_warning()
    assert "512 x 512 pixels are 1.02e+03 times larger in area than the 16 x 16" in warning
    assert "16 x 16 that model was trained on" in warning
    for side in (16, None):
        assert outline_teacher(model, side).size_warning() == ""
