"""Stable Diffusion teachers: roles on one frozen base, and the same pictures as the stock pipeline's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings
from flash_diffusion.flash_core.lora import FlashMetadata, read_lora, write_lora
from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.teachers import FAMILIES, load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher
from flash_diffusion.trainer.teachers.hashes import weights_hash

from ..families.pipelines import save_pipeline
from .models import tiny_stable_diffusion

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PROMPTS = ["red ball", "a yellow star"]


@pytest.fixture
def teacher(tiny_model: Path) -> Teacher:
    """A freshly loaded teacher."""
    return load_teacher(ModelSection(family="sd15", path=str(tiny_model)))


def add_trained_adapter(teacher: Teacher, role: str, seed: int = 0) -> None:
    """An adapter that changes something, as if trained."""
    teacher.denoiser.add_adapter(role, 4, 8, TARGETS, seed)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in teacher.denoiser.adapter_parameters(role).values():  # type: ignore[arg-type]
            value.add_(0.05 * torch.randn(value.shape, generator=generator))


def batch(teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and timesteps."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, *teacher.latent_shape, generator=generator), torch.tensor([999.0, 249.0])


# -- the same as diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"prediction_type": "epsilon", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ],
    ids=lambda scheduler: "-".join(str(value) for value in scheduler.values()),
)
@pytest.mark.parametrize("steps", [4, 16])
def test_the_rollout_is_the_stock_pipelines(
    tmp_path_factory: pytest.TempPathFactory, scheduler: dict[str, object], steps: int
) -> None:
    folder = tiny_stable_diffusion(tmp_path_factory.mktemp("model") / "tiny", **scheduler)
    teacher = load_teacher(ModelSection(family="sd21", path=str(folder)))
    noise, _ = batch(teacher)
    ours = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=steps)).teacher_solution(
        noise, teacher.encode_prompts(PROMPTS), teacher.unconditional(2), torch.full((2,), 4.0)
    )
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    theirs = pipeline(
        PROMPTS, latents=noise.clone(), num_inference_steps=steps, guidance_scale=4.0, output_type="latent"
    ).images
    spread = float(theirs.std())  # some 10 with linear betas: rounding grows with it
    assert spread > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4 * max(1.0, spread), rtol=1e-4)


def test_zero_terminal_snr_is_the_stock_pipelines(tmp_path: Path) -> None:
    """With DDIM: diffusers' DPM-Solver++ puts 2**-24 in place of the schedule's 0."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    folder = save_pipeline("sd21", tmp_path / "tiny", **settings)
    teacher = load_teacher(ModelSection(family="sd21", path=str(folder)))
    assert float(teacher.denoiser.process.alpha_sigma(torch.tensor([999.0]))[0]) == 0
    noise, _ = batch(teacher)
    ours = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=8, solver="ddim")).teacher_solution(
        noise, teacher.encode_prompts(PROMPTS), teacher.unconditional(2), torch.full((2,), 4.0)
    )
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPTS, latents=noise.clone(), num_inference_steps=8, guidance_scale=4.0, output_type="latent")
    torch.testing.assert_close(ours, theirs.images, atol=1e-4, rtol=1e-4)


def test_pixels_and_latents_are_the_stock_pipelines(teacher: Teacher, tiny_model: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mode = pipeline.vae.encode(images).latent_dist.mode() * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(teacher.encode(images), mode)
        decoded = pipeline.vae.decode(mode / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(teacher.decode(mode), decoded)


def test_teacher_has_the_models_facts(teacher: Teacher, tiny_model: Path) -> None:
    outline = outline_teacher(ModelSection(family="sd15", path=str(tiny_model)))
    assert outline.latent_shape == teacher.latent_shape == (4, 8, 8)
    assert teacher.resolution == (64, 64)
    assert outline.parameters == sum(value.numel() for value in teacher.denoiser.network.parameters())
    assert next(outline.denoiser.network.parameters()).device.type == "meta"
    assert outline_teacher(ModelSection(family="sd15", path=str(tiny_model)), 128).latent_shape == (4, 16, 16)


# -- roles -------------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing(teacher: Teacher) -> None:
    z, t = batch(teacher)
    conditioning = teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        bare = teacher.denoiser.predict(z, t, conditioning)
        teacher.denoiser.add_adapter("student", 4, 8, TARGETS)
        with teacher.denoiser.role("student"):
            assert torch.equal(teacher.denoiser.predict(z, t, conditioning), bare)


def test_each_role_is_its_own_network_on_one_base(teacher: Teacher) -> None:
    z, t = batch(teacher)
    conditioning = teacher.encode_prompts(PROMPTS)
    denoiser = teacher.denoiser
    with torch.no_grad():
        bare = denoiser.predict(z, t, conditioning)
        add_trained_adapter(teacher, "student", 1)
        with denoiser.role("student"):
            student = denoiser.predict(z, t, conditioning)
        add_trained_adapter(teacher, "critic", 2)
        with denoiser.role("student"):
            assert torch.equal(denoiser.predict(z, t, conditioning), student)
            with denoiser.role("critic"):
                critic = denoiser.predict(z, t, conditioning)
                with denoiser.role("teacher"):
                    assert torch.equal(denoiser.predict(z, t, conditioning), bare)
                assert torch.equal(denoiser.predict(z, t, conditioning), critic)
            assert torch.equal(denoiser.predict(z, t, conditioning), student)
        assert torch.equal(denoiser.predict(z, t, conditioning), bare)
    assert not torch.allclose(student, bare, atol=1e-3)
    assert not torch.allclose(student, critic, atol=1e-3)


def test_a_role_comes_back_after_an_error(teacher: Teacher) -> None:
    z, t = batch(teacher)
    conditioning = teacher.encode_prompts(PROMPTS)
    add_trained_adapter(teacher, "student")
    with torch.no_grad():
        bare = teacher.denoiser.predict(z, t, conditioning)
        with pytest.raises(ZeroDivisionError), teacher.denoiser.role("student"):
            raise ZeroDivisionError
        assert torch.equal(teacher.denoiser.predict(z, t, conditioning), bare)


def test_gradients_reach_the_role_that_is_on_and_the_input(teacher: Teacher) -> None:
    z, t = batch(teacher)
    conditioning = teacher.encode_prompts(PROMPTS)
    add_trained_adapter(teacher, "student", 1)
    add_trained_adapter(teacher, "critic", 2)
    with teacher.denoiser.role("critic"):
        leaf = z.clone().requires_grad_()
        teacher.denoiser.predict(leaf, t, conditioning).square().mean().backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) > 0
    moved = {
        name.split(".")[-2] for name, value in teacher.denoiser.network.named_parameters() if value.grad is not None
    }
    assert moved == {"critic"}


def test_a_role_without_an_adapter_is_refused(teacher: Teacher) -> None:
    with pytest.raises(ValueError, match="no critic adapter"), teacher.denoiser.role("critic"):
        pass


def test_adapters_are_float32_on_a_bfloat16_base(tiny_model: Path) -> None:
    teacher = load_teacher(ModelSection(family="sd15", path=str(tiny_model), dtype="bfloat16"))
    add_trained_adapter(teacher, "student")
    assert {value.dtype for value in teacher.denoiser.adapter_parameters("student").values()} == {torch.float32}
    assert teacher.denoiser.dtype == torch.bfloat16
    z, t = batch(teacher)
    with teacher.denoiser.role("student"):
        output = teacher.denoiser.predict(z, t, teacher.encode_prompts(PROMPTS))
        output.square().mean().backward()
    assert output.dtype == torch.float32
    gradients = [value.grad for value in teacher.denoiser.adapter_parameters("student").values()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


def test_features_are_hidden_states_of_several_depths(teacher: Teacher) -> None:
    z, t = batch(teacher)
    features = teacher.denoiser.features(z, t, teacher.encode_prompts(PROMPTS))
    assert len(features) >= 3
    assert {feature.ndim for feature in features} == {4}
    assert {len(feature) for feature in features} == {2}
    assert len({feature.shape[1:] for feature in features}) > 1
    assert not any(module._forward_hooks for module in teacher.denoiser.network.modules())
    leaf = z.clone().requires_grad_()
    first = teacher.denoiser.features(leaf, t, teacher.encode_prompts(PROMPTS))[0]
    assert float(torch.autograd.grad(first.square().sum(), leaf)[0].abs().max()) > 0


def test_an_unknown_target_raises_an_error_that_lists_the_layers(teacher: Teacher) -> None:
    with pytest.raises(UserError, match=r"lora\.targets.*'query'.*to_q"):
        teacher.denoiser.add_adapter("student", 4, 4, ["query"])


def test_an_adapter_survives_the_file(teacher: Teacher, tiny_model: Path, tmp_path: Path) -> None:
    add_trained_adapter(teacher, "student")
    metadata = FlashMetadata("sd15", "epsilon", "vp", {1: (999.0,)})
    write_lora(tmp_path / "lora.safetensors", teacher.denoiser.adapter("student"), metadata)
    other = load_teacher(ModelSection(family="sd15", path=str(tiny_model)))
    other.denoiser.load_adapter("student", read_lora(tmp_path / "lora.safetensors").modules)
    z, t = batch(teacher)
    conditioning = teacher.encode_prompts(PROMPTS)
    with torch.no_grad(), teacher.denoiser.role("student"), other.denoiser.role("student"):
        ours, theirs = teacher.denoiser.predict(z, t, conditioning), other.denoiser.predict(z, t, conditioning)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_lora_of_another_model_is_refused(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> None:
    add_trained_adapter(teacher, "student")
    modules = teacher.denoiser.adapter("student")
    first = next(iter(modules.values()))
    wrong = {"x": type(first)("mid_block.attentions.7.to_q", first.down, first.up, first.alpha)}
    with pytest.raises(UserError, match="1 of 1 layers"):
        teacher.denoiser.load_adapter("critic", wrong)


def test_release_encoders_frees_the_encoders(teacher: Teacher) -> None:
    z, _ = batch(teacher)
    null, picture = teacher.unconditional(2), teacher.decode(z)
    teacher.release_encoders()
    assert torch.equal(teacher.unconditional(2).cross_attention, null.cross_attention)  # type: ignore[arg-type]
    assert torch.equal(teacher.decode(z), picture)
    with pytest.raises(RuntimeError, match="released"):
        teacher.encode_prompts(["x"])
    with pytest.raises(RuntimeError, match="released"):
        teacher.encode(picture)


def test_weights_hash_ignores_adapters(teacher: Teacher) -> None:
    before = teacher.weights_hash()
    add_trained_adapter(teacher, "student")
    assert teacher.weights_hash() == before
    with torch.no_grad():
        next(iter(teacher.denoiser.network.parameters())).add_(1)
    assert weights_hash(teacher.denoiser.network) != before


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, r"model\.path: is missing"),
        ("/nowhere/at/all", "does not exist"),
        (__file__, "not a diffusers folder"),
        (str(Path(__file__).parent), r"no model_index\.json"),
    ],
)
def test_a_path_that_is_no_model_is_explained(path: str | None, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_teacher(ModelSection(family="sd15", path=path))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_an_incomplete_folder_is_explained(tiny_model: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(UserError, match="not a complete diffusers folder"):
        load_teacher(ModelSection(family="sd15", path=str(folder)))


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=", ".join(FAMILIES)):
        load_teacher(ModelSection(family="midjourney"))
