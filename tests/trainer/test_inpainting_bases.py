"""The 9-channel UNets of inpainting as teachers: folders and single files as published, and diffusers' own rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings
from flash_diffusion.trainer.config import ModelSection, TaskSection
from flash_diffusion.trainer.data.framing import to_mask, to_tensor
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher

from ..families.networks import tiny_network
from ..families.pipelines import save_pipeline
from ..families.single_file import save_single_file

PROMPTS = ["red ball", "a yellow star"]
PIPELINES = {"sd15": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline}


def stock(family: str, folder: Path) -> Any:
    """The family's inpainting pipeline."""
    options = {} if family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    pipeline = PIPELINES[family].from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random 9-channel models, saved by diffusers' inpainting pipelines as the published ones are."""
    root = tmp_path_factory.mktemp("inpainting")
    made = {}
    for family in PIPELINES:
        config = {name: value for name, value in tiny_network(family).config.items() if not name.startswith("_")}
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config | {"in_channels": 9})
        plain = save_pipeline(family, root / f"{family}-plain", unet=unet)
        made[family] = root / family
        stock(family, plain).save_pretrained(made[family])
        assert "Inpaint" in (made[family] / "model_index.json").read_text()
    return made


def picture_and_mask() -> tuple[Image.Image, Image.Image]:
    pixels = np.random.default_rng(4).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    mask = np.zeros((64, 64), np.uint8)
    mask[13:50, 20:41] = 255
    mask[:5] = 90  # below a half: not masked
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.mark.parametrize("family", PIPELINES)
def test_the_rollout_is_the_stock_inpainting_pipelines(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pipelines draw the masked picture's latents from the posterior; its mode is what the draws are around.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    teacher = load_teacher(ModelSection(family=family, path=str(folders[family])))
    task = build_task(TaskSection(name="inpainting"))
    assert teacher.denoiser.network.config["in_channels"] == 4 + task.extra_channels(4)
    picture, mask = picture_and_mask()
    images, masks = to_tensor(picture, (64, 64)), to_mask(mask, (64, 64))
    with torch.no_grad():
        own = task.conditions(
            images.expand(2, -1, -1, -1), teacher, torch.Generator(), {"mask": masks.expand(2, -1, -1, -1)}
        )
    conditioning = teacher.encode_prompts(PROMPTS).joined(own)
    start = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))
    ours = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=8)).teacher_solution(
        start, conditioning, task.unconditional(conditioning, teacher.unconditional(2)), torch.full((2,), 4.0)
    )
    pipeline = stock(family, folders[family])
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    theirs = pipeline(
        PROMPTS,
        image=[picture] * 2,
        mask_image=[mask] * 2,
        height=64,
        width=64,
        strength=1.0,
        latents=start.clone(),
        num_inference_steps=8,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_single_file_of_nine_channels_is_its_folder(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    file = save_single_file(stock(family, folders[family]), tmp_path / "inpaint.safetensors")
    model = ModelSection(family=family, path=str(file), config=str(folders[family]))
    teacher, folder = load_teacher(model), load_teacher(ModelSection(family=family, path=str(folders[family])))
    for name, value in folder.denoiser.network.state_dict().items():
        assert torch.equal(value, teacher.denoiser.network.state_dict()[name]), name
    outline = outline_teacher(model)
    assert (outline.denoiser.network.config["in_channels"], outline.latent_shape) == (9, (4, 8, 8))
