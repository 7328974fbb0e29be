"""The scheduler of a model card draws what our sampler draws, at every stochasticity: its Python runs as printed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from flash_diffusion.flash_core.denoiser import predict_z0
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.lora import FlashMetadata, LoraModule, nearest_stochasticity, read_lora, write_lora
from flash_diffusion.flash_core.process import VPProcess
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.demo.assets import LORAS
from flash_diffusion.trainer.export.card_scheduler import scheduler_code
from flash_diffusion.trainer.export.card_usage import usage
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.pipelines import save_pipeline
from .models import tiny_recipe

# The base's family, fields of its scheduler that differ, and its prediction.
BASES: dict[str, tuple[str, dict[str, bool], str]] = {
    "epsilon": ("sd15", {}, "epsilon"),
    "v": ("sd21", {}, "v_prediction"),
    "v, zero terminal SNR": ("sd21", {"rescale_betas_zero_snr": True}, "v_prediction"),
    "flow": ("sd3", {}, "flow"),
}
VP = {0.0: "DDIMScheduler", 0.5: "FlashScheduler", 1.0: "LCMScheduler"}
FLOW = {0.0: "FlowMatchEulerDiscreteScheduler", 0.5: "FlashScheduler", 1.0: "FlowMatchEulerDiscreteScheduler"}
SEED, PROMPT = 5, "red ball"


@dataclass(frozen=True)
class Student:
    """A tiny model with a random LoRA: as ours, and as a folder with a file for diffusers."""

    family: str
    folder: Path
    teacher: Teacher
    recipe: Recipe


@pytest.fixture(scope="module", params=BASES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    family, fields, prediction = BASES[request.param]
    folder = tmp_path_factory.mktemp(family)
    content = tiny_recipe(save_pipeline(family, folder / "base", **fields), folder)
    content["model"]["family"] = family
    if family == "sd3":
        content["data"]["resolution"] = 64
        content["method"]["solver"] = "euler"
    recipe = parse_recipe(content)
    teacher = load_teacher(recipe.model, "cpu", recipe.data.resolution)
    process = teacher.denoiser.process
    assert process.prediction == prediction
    assert (float(process.alpha_sigma(torch.tensor([999.0]))[0]) == 0) == bool(fields)
    teacher.denoiser.add_adapter("student", 4, 4, ["to_q", "to_v"])
    for index, value in enumerate(teacher.denoiser.adapter_parameters("student").values()):
        value.data = 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
    modules: dict[str, LoraModule] = dict(teacher.denoiser.adapter("student"))
    metadata = FlashMetadata(base=family, prediction=prediction, process=process.kind, timesteps={})
    (folder / "student").mkdir()
    transformer = family == "sd3"
    write_lora(folder / "student" / "lora.safetensors", modules, metadata, transformer=transformer)
    return Student(family, folder, teacher, recipe)


def by_card(student: Student, stochasticity: float) -> tuple[torch.Tensor, str]:
    """Return the latents of the card's Python, and the name of its scheduler."""
    options: dict[str, Any] = {} if student.family == "sd3" else {"safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(student.folder / "base", **options)
    pipe.set_progress_bar_config(disable=True)
    code = usage(student.recipe, "student", 4, student.teacher.denoiser.process, None, stochasticity).code
    setup, _, call = code.strip().rpartition("\n")
    names: dict[str, Any] = {"pipe": pipe, "prompt": PROMPT}
    exec(setup, names)  # noqa: S102
    # The flow scheduler draws from the global generator, so all numbers come from that one.
    names["generator"] = torch.manual_seed(SEED)
    call = call.replace("guidance_scale=1.0)", "guidance_scale=1.0, generator=generator, output_type='latent')")
    exec(call.replace(".images[0]", ".images"), names)  # noqa: S102
    return names["image"], type(pipe.scheduler).__name__


def by_us(student: Student, stochasticity: float) -> torch.Tensor:
    """Return the latents of our 4 steps."""
    denoiser = student.teacher.denoiser
    grid = trailing_timesteps(denoiser.process, 4)
    alphas, sigmas = denoiser.process.alpha_sigma(torch.tensor(grid, dtype=torch.float64))
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(1, *student.teacher.latent_shape, generator=generator)
    with torch.no_grad(), denoiser.role("student"):
        conditioning = student.teacher.encode_prompts([PROMPT])
        return few_step_sample(
            lambda z, index: predict_z0(denoiser, z, torch.tensor([grid[index]]), conditioning),
            z,
            alphas.tolist(),
            sigmas.tolist(),
            generator_noise(z, generator),
            stochasticity=stochasticity,
        )


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0])
def test_the_cards_python_draws_our_latents(
    student: Student, stochasticity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(student.folder)
    theirs, scheduler = by_card(student, stochasticity)
    assert scheduler == (FLOW if student.family == "sd3" else VP)[stochasticity]
    ours = by_us(student, stochasticity)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    other = by_us(student, 1.0 if stochasticity < 1 else 0.0)
    assert float((ours - other).abs().max()) > 0.01


def test_the_demo_loras_page_draws_as_its_metadata_say() -> None:
    """The page's scheduler is the cards' for the value that Flash Sampler's ``auto`` takes at 4 steps."""
    lora = read_lora(LORAS / "flash_demo.safetensors")
    assert lora.metadata is not None
    share, _ = nearest_stochasticity(lora.metadata.stochasticity, 4)
    process = VPProcess.from_betas(prediction="v_prediction")
    scheduler = scheduler_code(process, 4, share, takes_timesteps=True)
    page = (LORAS / "README.md").read_text(encoding="utf-8")
    assert f"value, {f'{share:g}'.lstrip('0')}" in page
    assert scheduler.definition in page
    assert scheduler.setting.replace(', prediction_type="v_prediction"', "") in page  # the teacher's folder says so
    assert scheduler.option in page
