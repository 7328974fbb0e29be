"""Model cards of every task: their Python runs as printed and draws what our sampler draws, or they say why not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import (
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from flash_diffusion.flash_core.denoiser import Conditioning, predict_z0
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.flash_core.process import VPProcess
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.data.framing import to_mask, to_tensor
from flash_diffusion.trainer.distill.loop import Run
from flash_diffusion.trainer.export.base_facts import control_facts, facts_of
from flash_diffusion.trainer.export.card_usage import is_on_disk, shown, usage
from flash_diffusion.trainer.export.model_card import model_card
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.tasks.inpainting import black_and_white, masked_pictures
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.adapters import tiny_controlnet, tiny_t2i_adapter, tiny_unet
from ..families.image_adapters import SIDE, save_image_adapter, save_image_encoder
from ..families.networks import tiny_network
from ..families.pipelines import save_pipeline
from ..families.upscaler import save_upscaler
from .models import tiny_recipe

PLAIN = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd_x4": StableDiffusionUpscalePipeline}
LIGHTEST = {"updates": 1, "modes": [0.4, 0.2, 0.2, 0.2]}
SEED = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of every kind and what is used beside them, in the folder that cards are run in."""
    root = tmp_path_factory.mktemp("cards")
    for family in ("sd15", "sdxl"):
        save_pipeline(family, root / family, unet=tiny_unet(family))
        config = {name: value for name, value in tiny_network(family).config.items() if not name.startswith("_")}
        torch.manual_seed(0)
        save_pipeline(family, root / f"{family}-inpainting", unet=UNet2DConditionModel(**config | {"in_channels": 9}))
        tiny_controlnet(tiny_unet(family)).save_pretrained(root / f"{family}-controlnet")
    save_upscaler(root / "x4")
    tiny_t2i_adapter("full_adapter").save_pretrained(root / "sd15-t2i")
    tiny_t2i_adapter("full_adapter_xl").save_pretrained(root / "sdxl-t2i")
    save_image_encoder(root / "encoder")
    save_image_adapter(root / "ip-adapter.safetensors", tiny_network("sd15"))
    return root


def trained(
    root: Path, pictures: Path, name: str, family: str, base: str, task: dict[str, Any], **model: Any
) -> tuple[Run, Path]:
    """A run of one update that changes the student much, and its LoRA."""
    content = tiny_recipe(root / base, pictures) | {
        "model": {"family": family, "path": str(root / base), **model},
        "task": task,
        "optimizer": {"lr": 0.05},
        "phases": [{"name": "all", **LIGHTEST}],
        "preview": {"every": 0, "prompts": ["red ball"], "steps": [1]},
    }
    run = Run(parse_recipe(content), root / name, Accelerator(), None)
    return run, run.train()


def code_of(lora: Path) -> str:
    """The card's Python."""
    return (lora.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]


def drawn_by_card(
    lora: Path, family: str, base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, **given: Any
) -> np.ndarray[Any, Any]:
    """The picture (H, W, 3) in [0, 1] of the card's Python, and no warning of its timesteps."""
    monkeypatch.chdir(lora.parent.parent)
    # Pipelines draw a masked picture's latents from the posterior; its mode is what the draws are around.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if family == "sd15" else {}
    pipe = PLAIN[family].from_pretrained(lora.parent.parent / base, **options)
    names: dict[str, Any] = {"pipe": pipe, "prompt": "red ball", **given}
    setup, _, call = code_of(lora).strip().rpartition("\n")
    with caplog.at_level(logging.WARNING):
        exec(setup, names)  # noqa: S102
        torch.manual_seed(SEED)  # only now: what is loaded may draw numbers too
        exec(call, names)  # noqa: S102
    assert "timestep" not in caplog.text
    return np.asarray(names["image"]) / 255


def drawn_by_us(run: Run, conditioning: Conditioning, generator: torch.Generator | None = None) -> np.ndarray[Any, Any]:
    """Our 4 steps of the student as a picture (H, W, 3) in [0, 1]."""
    teacher = run.parts.teacher
    denoiser = teacher.denoiser
    grid = trailing_timesteps(denoiser.process, 4)
    alphas, sigmas = denoiser.process.alpha_sigma(torch.tensor(grid, dtype=torch.float64))
    generator = generator or torch.Generator().manual_seed(SEED)
    z = torch.randn(1, *teacher.latent_shape, generator=generator)
    with torch.no_grad(), run.parts.average.applied(), denoiser.role("student"):
        z = few_step_sample(
            lambda z, index: predict_z0(denoiser, z, torch.tensor([grid[index]]), conditioning),
            z,
            alphas.tolist(),
            sigmas.tolist(),
            generator_noise(z, generator),
        )
        return (teacher.decode(z)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def conditions(run: Run, prompt: str, **drawn: Any) -> Conditioning:
    """A prompt and what the task draws, by a teacher that still has its encoders."""
    teacher: Teacher = load_teacher(run.recipe.model)
    with torch.no_grad():
        return teacher.encode_prompts([prompt]).joined(build_task(run.recipe.task).encode(drawn, teacher))


def picture(size: int = 64, seed: int = 4) -> Image.Image:
    """Random blocks."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))


def mask() -> Image.Image:
    """A rectangle."""
    pixels = np.zeros((64, 64), np.uint8)
    pixels[13:50, 20:41] = 255
    return Image.fromarray(pixels)


def masked() -> dict[str, Any]:
    """The picture and the mask as a task draws them."""
    masks = black_and_white(to_mask(mask(), (64, 64))[None])
    return {"mask": masks, "masked": masked_pictures(to_tensor(picture(), (64, 64))[None], masks)}


def head_of(lora: Path) -> dict[str, Any]:
    """The card's head."""
    return yaml.safe_load((lora.parent / "README.md").read_text().split("---")[1])


def test_the_schedulers_own_grid_is_the_trained_one() -> None:
    """For the pipelines that take a number of steps alone."""
    scheduler = LCMScheduler(original_inference_steps=100)
    for steps in (1, 2, 4):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == trailing_timesteps(VPProcess.from_betas(), steps)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_inpainting(
    root: Path, pictures: Path, family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = f"{family}-inpainting"
    run, lora = trained(root, pictures, f"inpaint-{family}", family, base, {"name": "inpainting"})
    theirs = drawn_by_card(lora, family, base, monkeypatch, caplog, image=picture(), mask_image=mask())
    assert np.abs(theirs - drawn_by_us(run, conditions(run, "red ball", **masked()))).max() <= 2 / 255
    head = head_of(lora)
    assert head["pipeline_tag"] == "image-to-image"
    assert "inpainting" in head["tags"]
    assert "text-to-image" not in head["tags"]
    assert "Flash Inpaint Prepare" in (lora.parent / "README.md").read_text()


def test_the_x4_upscaler(
    root: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"reads": "pixels", "scale": 4, "noise_level": [30, 90], "jpeg": None}
    task = {"name": "super-resolution", "options": options}
    run, lora = trained(root, pictures, "upscale", "sd_x4", "x4", task)
    small = picture(16)
    theirs = drawn_by_card(lora, "sd_x4", "x4", monkeypatch, caplog, image=small)
    assert "noise_level=30" in code_of(lora)  # of the levels it was trained at, the nearest to the stock one
    generator = torch.Generator().manual_seed(SEED)
    given = {
        "small": to_tensor(small, (16, 16))[None],
        "noise_level": torch.tensor([30]),
        "noise": torch.randn(1, 3, 16, 16, generator=generator),  # the pipeline's first draw
    }
    assert np.abs(theirs - drawn_by_us(run, conditions(run, "red ball", **given), generator)).max() <= 2 / 255
    assert head_of(lora)["tags"][-2:] == ["image-to-image", "super-resolution"]
    assert read_lora(lora).metadata.base == "sd_x4"  # type: ignore[union-attr]


def test_face_swap_by_tokens(
    root: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = {"path": str(root / "ip-adapter.safetensors"), "image_encoder": str(root / "encoder"), "scale": 0.6}
    task = {"name": "face-swap", "options": {"identity": "tokens"}}
    run, lora = trained(root, pictures, "swap", "sd15", "sd15-inpainting", task, image_adapter=adapter)
    face = picture(SIDE, seed=7)
    pictures_given = {"image": picture(), "mask_image": mask(), "identity": face}
    theirs = drawn_by_card(lora, "sd15", "sd15-inpainting", monkeypatch, caplog, **pictures_given)
    ours = conditions(run, "", **masked(), identity=to_tensor(face, (SIDE, SIDE))[None])
    assert np.abs(theirs - drawn_by_us(run, ours)).max() <= 2 / 255
    card = (lora.parent / "README.md").read_text()
    for part in ("set_ip_adapter_scale(0.6)", "ip-adapter (IP-Adapter) x 0.6", "right to change"):
        assert part in card
    assert str(root.parent) not in card
    assert read_lora(lora).metadata.training["image_adapter"] == "ip-adapter (IP-Adapter) x 0.6"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("family", "kind"), [("sd15", "controlnet"), ("sdxl", "controlnet"), ("sd15", "t2i"), ("sdxl", "t2i")]
)
def test_control(
    root: Path,
    pictures: Path,
    family: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = {"path": str(root / f"{family}-{kind}"), "scale": 0.7 if kind == "controlnet" else None}
    name = f"{kind}-{family}"
    run, lora = trained(root, pictures, name, family, family, {"name": "control"}, control=control)
    hint = mask().convert("RGB")
    theirs = drawn_by_card(lora, family, family, monkeypatch, caplog, image=hint)
    ours = conditions(run, "red ball", hint=(to_tensor(hint, (64, 64))[None] + 1) / 2)
    assert np.abs(theirs - drawn_by_us(run, ours)).max() <= 2 / 255
    scale = "controlnet_conditioning_scale=0.7" if kind == "controlnet" else "adapter_conditioning_scale=0.8"
    assert scale in code_of(lora)
    assert head_of(lora)["tags"][-1] == ("controlnet" if kind == "controlnet" else "t2i-adapter")


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("demo_inpainting", "the task adapter inpainting"),
        ("demo_face_swap", "the task adapter face-swap"),
        ("demo_super_resolution", "the task adapter super-resolution"),
        ("super_resolution_sd15", "latents of an enlarged picture"),
        ("demo_controlnet", "not by canny_control_lora.safetensors"),
        ("demo_t2i_adapter", "not by canny_t2i_adapter.safetensors"),
    ],
)
def test_card_has_no_code_without_a_diffusers_pipeline(recipe: str, reason: str) -> None:
    loaded = load_recipe(recipe)
    control = None if loaded.model.control is None else control_facts(loaded.model.control, "canny")
    found = usage(loaded, "run", 4, VPProcess.from_betas(), control)
    assert not found.code
    assert reason in found.words


def test_identity_in_channels_has_no_stock_pipeline() -> None:
    for identity in ("channels", "both"):
        recipe = load_recipe("face_swap", [f"task.options.identity={identity}"])
        assert "identity picture as input channels" in usage(recipe, "run", 4, VPProcess.from_betas()).words


def test_the_shipped_face_swap_recipes_card_names_the_hubs_folders() -> None:
    found = usage(load_recipe("face_swap"), "run", 4, VPProcess.from_betas())
    assert 'from_pretrained("h94/IP-Adapter", subfolder="models/image_encoder")' in found.code
    assert 'load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name=' in found.code
    assert '"ip-adapter-plus-face_sd15.safetensors"' in found.code


def test_a_card_without_code_points_to_the_nodes(root: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = load_recipe("demo_inpainting")
    run, lora = trained(root, pictures, "plain", "sd15", "sd15", {"name": "text-to-image"})
    file = read_lora(lora)
    assert file.metadata is not None
    facts = facts_of(run.recipe, run.parts.teacher)
    card = model_card(tmp_path, recipe, file.modules, file.metadata, facts, run.state)
    assert "```python" not in card
    assert "no stock pipeline has its base" in card
    assert "Use the ComfyUI nodes." in card


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/somebody/models/private", "private"),
        ("../private", "private"),
        ("model.safetensors", "model.safetensors"),
        ("owner/model", "owner/model"),
    ],
)
def test_a_path_of_another_machine_is_not_published(path: str, name: str) -> None:
    assert shown(path) == name
    assert is_on_disk(path) == (path != "owner/model")
