"""Every UNet family, on whole tiny models of its true architecture: as stock diffusers has it, from text to LoRA."""

from __future__ import annotations

import gc
import io
import logging
import shutil
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning, predict_z0
from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.trainer.config import ModelSection, parse_recipe
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.loop import Run, distil
from flash_diffusion.trainer.distill.plan import print_plan
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.teachers import family as family_class
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.networks import tiny_network
from ..families.pipelines import UNET_FAMILIES, save_pipeline
from ..families.single_file import save_single_file
from .models import tiny_recipe

PROMPTS = ["red ball", "a yellow star"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole pipeline of each family."""
    root = tmp_path_factory.mktemp("families")
    return {family: save_pipeline(family, root / family) for family in UNET_FAMILIES}


def stock(family: str, folder: Path, **options: Any) -> Any:
    """The family's stock pipeline."""
    pipeline_class = family_class(family).pipeline_class
    if family != "sdxl":
        options |= {"safety_checker": None, "requires_safety_checker": False}
    pipeline = pipeline_class.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(family: str, path: Path, **fields: Any) -> Teacher:
    """Our teacher."""
    return load_teacher(ModelSection(family=family, path=str(path), **fields))


def noise(teacher: Teacher) -> Tensor:
    """Two latents of pure noise."""
    return torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(3))


@contextmanager
def library_messages() -> Iterator[list[str]]:
    """Every warning that diffusers, transformers, PEFT or accelerate logs inside the block, and Python's own."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft", "accelerate")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield messages
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            messages.extend(str(warning.message) for warning in caught)


def about_keys(messages: list[str]) -> list[str]:
    """Return the messages about missing, unexpected or unused weights."""
    words = ("missing", "unexpected", "not used", "newly initialized", "no lora keys", "not initialized")
    # diffusers says of every LoRA without text encoder layers that there are none, "safe to ignore".
    wanted = [message for message in messages if "safe to ignore" not in message]
    return [message for message in wanted if any(word in message.lower() for word in words)]


# -- the same as diffusers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "solver", "schedule"),
    [
        ("sd15", "dpmpp_2m", {}),
        ("sd15", "ddim", {}),
        ("sd21", "dpmpp_2m", {}),
        ("sd21", "dpmpp_2m", {"prediction_type": "epsilon"}),
        ("sd21", "ddim", {"rescale_betas_zero_snr": True}),
        ("sdxl", "dpmpp_2m", {}),
        ("sdxl", "ddim", {}),
        ("sdxl", "ddim", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_the_rollout_is_the_stock_pipelines(
    tmp_path: Path, family: str, solver: Any, schedule: dict[str, object]
) -> None:
    folder = save_pipeline(family, tmp_path / "model", **schedule)
    teacher = load(family, folder)
    start = noise(teacher)
    ours = Distiller(teacher.denoiser, DistillerSettings(teacher_steps=8, solver=solver)).teacher_solution(
        start, teacher.encode_prompts(PROMPTS), teacher.unconditional(2), torch.full((2,), 4.0)
    )
    pipeline = stock(family, folder)
    scheduler = DPMSolverMultistepScheduler if solver == "dpmpp_2m" else DDIMScheduler
    changes = {"timestep_spacing": "trailing"}
    if solver == "ddim":
        changes |= {"clip_sample": False, "set_alpha_to_one": True}  # land on the clean latent, as we do
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **changes)
    theirs = pipeline(
        PROMPTS, latents=start.clone(), num_inference_steps=8, guidance_scale=4.0, output_type="latent"
    ).images
    assert float(theirs.std()) > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_pixels_are_the_stock_pipelines(folders: dict[str, Path], family: str) -> None:
    teacher, pipeline = load(family, folders[family]), stock(family, folders[family])
    latents = noise(teacher)
    pipeline.vae.register_to_config(shift_factor=0.25)  # no UNet family has one; the formula does
    teacher.vae.register_to_config(shift_factor=0.25)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor + 0.25).sample
        torch.testing.assert_close(teacher.decode(latents), decoded)
        mode = pipeline.vae.encode(decoded).latent_dist.mode()
        torch.testing.assert_close(teacher.encode(decoded), (mode - 0.25) * pipeline.vae.config.scaling_factor)


def test_sdxl_without_a_prompt_is_zeros_or_the_empty_prompt_as_the_model_says(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher = load("sdxl", folders["sdxl"])
    null = teacher.unconditional(2)
    assert float(null.cross_attention.abs().max()) == float(null.vector.abs().max()) == 0  # type: ignore[union-attr]
    assert null.size_ids.tolist() == [[64, 64, 0, 0, 64, 64]] * 2  # type: ignore[union-attr]
    pipeline = stock("sdxl", folders["sdxl"], force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path / "empty")
    other = load("sdxl", tmp_path / "empty").unconditional(1)
    _, text, _, pooled = pipeline.encode_prompt("x", device="cpu", negative_prompt="")
    torch.testing.assert_close(other.cross_attention, text)
    torch.testing.assert_close(other.vector, pooled)


def test_sizes_reach_the_network_unrounded(folders: dict[str, Path]) -> None:
    """bfloat16 has 8 bits of precision, too few for 1,037 pixels."""
    teacher = load("sdxl", folders["sdxl"], dtype="bfloat16")
    seen: list[Tensor] = []
    teacher.denoiser.network.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    given = teacher.encode_prompts(PROMPTS)
    sizes = torch.tensor([[1037.0, 1001.0, 3.0, 5.0, 1037.0, 1001.0]] * 2)
    with torch.no_grad():
        teacher.denoiser.predict(
            noise(teacher),
            torch.tensor([999.0, 249.0]),
            Conditioning(cross_attention=given.cross_attention, vector=given.vector, size_ids=sizes),
        )
    assert torch.equal(seen[0].float(), sizes.flatten())


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_extra_input_channels_are_joined_to_the_latents(tmp_path: Path, family: str) -> None:
    """The 9-channel UNets of inpainting."""
    config = {name: value for name, value in tiny_network(family).config.items() if not name.startswith("_")}
    folder = save_pipeline(family, tmp_path / "model", unet=UNet2DConditionModel(**config | {"in_channels": 9}))
    teacher = load(family, folder)
    assert teacher.latent_shape == (4, 8, 8)
    z, t = noise(teacher), torch.tensor([999.0, 249.0])
    extra = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    given = teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours = teacher.denoiser.predict(
            z, t, Conditioning(given.cross_attention, vector=given.vector, size_ids=given.size_ids, concat=extra)
        )
        added = None if given.vector is None else {"text_embeds": given.vector, "time_ids": given.size_ids}
        theirs = teacher.denoiser.network(
            torch.cat([z, extra], 1), t, encoder_hidden_states=given.cross_attention, added_cond_kwargs=added
        ).sample
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_features_are_hidden_states_of_several_depths(folders: dict[str, Path], family: str) -> None:
    teacher = load(family, folders[family])
    given = teacher.encode_prompts(PROMPTS)
    leaf = noise(teacher).requires_grad_()
    features = teacher.denoiser.features(leaf, torch.tensor([999.0, 249.0]), given)
    assert len(features) >= 3
    assert all(feature.ndim == 4 and len(feature) == 2 for feature in features)
    assert not any(feature.shape[1] == 4 for feature in features), "a prediction is no hidden state"
    for feature in features:
        assert float(torch.autograd.grad(feature.square().sum(), leaf, retain_graph=True)[0].abs().max()) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_feature_pass_ends_after_the_last_block_that_is_read(folders: dict[str, Path], checkpointing: bool) -> None:
    """The maps and their gradients are those of a whole pass, to the bit; with checkpointing the pass is whole."""
    teacher = load("sd15", folders["sd15"])
    denoiser, given = teacher.denoiser, teacher.encode_prompts(PROMPTS)
    if checkpointing:
        denoiser.network.enable_gradient_checkpointing()
    t, whole, later = torch.tensor([999.0, 249.0]), [], []
    leaf, other = noise(teacher).requires_grad_(), noise(teacher).requires_grad_()
    handles = [block.register_forward_hook(lambda _, __, out: whole.append(out)) for block in denoiser.feature_blocks()]
    denoiser.predict(other, t, given)
    for handle in handles:
        handle.remove()
    whole = [denoiser.as_map(output, other) for output in whole]
    denoiser.network.conv_out.register_forward_hook(lambda *_: later.append(1))
    features = denoiser.features(leaf, t, given)
    assert bool(later) == checkpointing
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, whole, strict=True))
    gradient, wanted = (
        torch.autograd.grad(sum(part.square().sum() for part in parts), z)[0]
        for parts, z in ((features, leaf), (whole, other))
    )
    assert torch.equal(gradient, wanted)
    denoiser.predict(leaf, t, given)  # no hook is left
    assert later


# -- from training to a file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_five_updates_change_the_lora_alone_and_stock_diffusers_draws_with_it(
    folders: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    recipe = parse_recipe(
        tiny_recipe(folders[family], pictures)
        | {"model": {"family": family, "path": str(folders[family])}, "optimizer": {"lr": 0.02}}
    )
    assert recipe.updates == 5
    with library_messages() as messages:
        run = Run(recipe, tmp_path / "run", Accelerator(), None)
        teacher = run.parts.teacher
        network = teacher.denoiser.network
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        conditioning = teacher.unconditional(2)
        lora = run.train()
    assert not about_keys(messages)
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {name for name in before if ".lora_" in name}

    z, t = noise(teacher), torch.tensor([999.0, 249.0])
    with torch.no_grad():
        bare = teacher.denoiser.predict(z, t, conditioning)
        with run.parts.average.applied(), teacher.denoiser.role("student"):
            trained = teacher.denoiser.predict(z, t, conditioning)
    assert not torch.allclose(trained, bare, atol=1e-3)
    pipeline = stock(family, folders[family])
    with library_messages() as messages:
        monkeypatch.chdir(tmp_path)
        theirs = run_card(lora, pipeline)
    assert not about_keys(messages)
    added = {"text_embeds": conditioning.vector, "time_ids": conditioning.size_ids}
    with torch.no_grad():
        loaded = pipeline.unet(z, t, encoder_hidden_states=conditioning.cross_attention, added_cond_kwargs=added).sample
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-5)

    with run.parts.average.applied():
        ours = few_steps(teacher, load(family, folders[family]).encode_prompts(["red ball"]))
    assert np.abs(theirs - ours).max() <= 2 / 255


def test_the_card_of_a_single_file_says_what_the_file_predicts(
    folders: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock diffusers takes the configuration's epsilon for it."""
    file = save_single_file(stock("sdxl", folders["sdxl"]), tmp_path / "model.safetensors", marks=("v_pred", "ztsnr"))
    model = {"family": "sdxl", "path": str(file), "config": str(folders["sdxl"])}
    content = tiny_recipe(folders["sdxl"], pictures) | {"model": model, "optimizer": {"lr": 0.02}}
    content["method"]["solver"] = "ddim"
    content["phases"] = content["phases"][:1]
    run = Run(parse_recipe(content), tmp_path / "run", Accelerator(), None)
    lora = run.train()
    pipeline = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folders["sdxl"]))
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.chdir(tmp_path)
    theirs = run_card(lora, pipeline)
    with run.parts.average.applied():
        ours = few_steps(run.parts.teacher, load_teacher(run.recipe.model).encode_prompts(["red ball"]))
    assert np.abs(theirs - ours).max() <= 2 / 255


def few_steps(teacher: Teacher, conditioning: Conditioning) -> np.ndarray[Any, Any]:
    """Our 4 steps of the student as a picture (H, W, 3) in [0, 1]."""
    denoiser = teacher.denoiser
    grid = trailing_timesteps(denoiser.process, 4)
    alphas, sigmas = denoiser.process.alpha_sigma(torch.tensor(grid, dtype=torch.float64))
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(1, *teacher.latent_shape, generator=generator)
    with torch.no_grad(), denoiser.role("student"):
        z = few_step_sample(
            lambda z, index: predict_z0(denoiser, z, torch.tensor([grid[index]]), conditioning),
            z,
            alphas.tolist(),
            sigmas.tolist(),
            generator_noise(z, generator),
        )
        return (teacher.decode(z)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def run_card(lora: Path, pipe: Any) -> np.ndarray[Any, Any]:
    """Load the LoRA and draw a picture (H, W, 3) in [0, 1] by the Python of the model card."""
    code = (lora.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"pipe": pipe, "prompt": "red ball"}
    torch.manual_seed(5)
    exec(code, names)  # noqa: S102
    return np.asarray(names["image"]) / 255


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_a_bfloat16_base_trains_as_a_float32_one(folders: dict[str, Path], family: str) -> None:
    """In half the bytes and under autocast the student's gradients point the same way."""
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        teacher = load(family, folders[family], dtype=dtype)
        teacher.denoiser.add_adapter("student", 4, 4, teacher.default_targets)
        given = teacher.encode_prompts(PROMPTS)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32", cache_enabled=False)
        with teacher.denoiser.role("student"), autocast:
            output = teacher.denoiser.predict(noise(teacher), torch.tensor([999.0, 249.0]), given)
            output.square().mean().backward()
        values = [value.grad for value in teacher.denoiser.adapter_parameters("student").values()]
        gradients[dtype] = torch.cat([value.flatten() for value in values if value is not None])
        assert gradients[dtype].dtype == torch.float32
    assert torch.cosine_similarity(gradients["bfloat16"], gradients["float32"], dim=0) > 0.99


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_gradient_checkpointing_changes_no_gradient(
    folders: dict[str, Path], pictures: Path, tmp_path: Path, family: str
) -> None:
    """All terms with a critic, the roles moving on while blocks are recomputed; SD 1.5 is in the loop's tests."""
    content = tiny_recipe(folders[family], pictures) | {"model": {"family": family, "path": str(folders[family])}}
    content["method"]["fake_score"] = "critic"
    gradients = []
    for recompute in (False, True):
        recipe = parse_recipe({**content, "gradient_checkpointing": recompute})
        parts = assemble(recipe, Accelerator())
        assert parts.teacher.denoiser.network.is_gradient_checkpointing is recompute
        generator = torch.Generator().manual_seed(0)
        student = parts.trained.parameters["student"]
        with torch.no_grad():
            for value in student.values():
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
        z0, conditioning = parts.examples.batch(torch.tensor([0, 3]), "cpu")
        phase = recipe.phases[1].phase()
        rollout = parts.distiller.rollout(z0, conditioning, parts.teacher.unconditional(2), phase, generator)
        parts.distiller.student_step(rollout, phase, generator)
        gradients.append([value.grad for value in student.values()])
    assert all(gradient is not None for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_shipped_recipe_runs_with_only_model_and_data_changed(
    folders: dict[str, Path], pictures: Path, tmp_path: Path, family: str
) -> None:
    """But for the number of updates: in bfloat16, as it says, with plan, preview and card."""
    changes = [f"model.path={folders[family]}", "data.source=folder", f"data.path={pictures}", "data.resolution=64"]
    changes += [f"phases.{phase}.updates=1" for phase in range(4)]
    recipe = load_recipe(family, changes)
    assert (recipe.model.family, recipe.model.dtype, recipe.precision) == (family, "bfloat16", "bf16")
    plan = Console(record=True, width=120, file=io.StringIO())
    print_plan(recipe, plan)
    assert "4 x 8 x 8 per sample" in plan.export_text()
    lora = read_lora(distil(recipe, tmp_path / "run"))
    assert lora.metadata is not None
    assert (lora.metadata.base, lora.metadata.process) == (family, "vp")
    assert lora.metadata.prediction == "epsilon"
    assert set(lora.ranks) == {recipe.lora.rank}
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 1
    card = (tmp_path / "run" / "README.md").read_text()
    assert "LCMScheduler.from_config" in card
    assert "timesteps=[999, 749, 499, 249]" in card


# -- where models come from ------------------------------------------------------------------------------------------


def same(ours: Teacher, theirs: Teacher) -> None:
    """Two teachers have the same weights and make the same conditions and pictures."""
    state, other = ours.denoiser.network.state_dict(), theirs.denoiser.network.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name
    conditions, others = ours.encode_prompts(PROMPTS), theirs.encode_prompts(PROMPTS)
    assert torch.equal(conditions.cross_attention, others.cross_attention)  # type: ignore[arg-type]
    if conditions.vector is not None:
        assert torch.equal(conditions.vector, others.vector)  # type: ignore[arg-type]
    with torch.no_grad():
        picture = ours.decode(noise(ours))
        assert torch.equal(picture, theirs.decode(noise(ours)))
        assert torch.equal(ours.encode(picture), theirs.encode(picture))
    assert ours.denoiser.process.alpha_sigma(torch.tensor([249.0])) == theirs.denoiser.process.alpha_sigma(
        torch.tensor([249.0])
    )


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_a_single_file_is_its_folder(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = folders[family]
    file = save_single_file(stock(family, folder), tmp_path / "a model.safetensors")
    with library_messages() as messages:
        teacher = load(family, file, config=str(folder))
    assert not about_keys(messages)
    same(teacher, load(family, folder))
    assert teacher.name == "a model"
    outline = outline_teacher(ModelSection(family=family, path=str(file), config=str(folder)))
    assert (outline.name, outline.latent_shape) == ("a model", teacher.latent_shape)


@pytest.mark.parametrize(("marks", "zero"), [(("v_pred",), False), (("v_pred", "ztsnr"), True)])
def test_a_single_file_may_say_that_it_predicts_v(
    folders: dict[str, Path], tmp_path: Path, marks: tuple[str, ...], zero: bool
) -> None:
    """As ComfyUI reads fine-tunes of SDXL (comfy/supported_models.py, SDXL.model_type)."""
    file = save_single_file(stock("sdxl", folders["sdxl"]), tmp_path / "model.safetensors", marks=marks)
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero}
    wanted = load("sdxl", save_pipeline("sdxl", tmp_path / "folder", **settings)).denoiser.process
    model = ModelSection(family="sdxl", path=str(file), config=str(folders["sdxl"]))
    for process in (load_teacher(model).denoiser.process, outline_teacher(model).denoiser.process):
        assert process.prediction == "v_prediction"
        alphas = process.alpha_sigma(torch.arange(1000.0))[0]
        assert torch.equal(alphas, wanted.alpha_sigma(torch.arange(1000.0))[0])
        assert (float(alphas[-1]) == 0) is zero


def test_a_single_file_with_edms_noise_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Playground 2.5's mark."""
    file = save_single_file(stock("sdxl", folders["sdxl"]), tmp_path / "model.safetensors", marks=("edm_mean",))
    with pytest.raises(UserError, match=r"model\.path: model has an EDM noise schedule"):
        load("sdxl", file, config=str(folders["sdxl"]))


def test_a_file_that_is_no_safetensors_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x80\x04 not what its name says")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load("sd15", file, config=str(folders["sd15"]))


@pytest.mark.parametrize(("family", "dtype"), [("sd15", "float16"), ("sdxl", "bfloat16")])
def test_a_half_precision_file_is_stored_as_the_recipe_says(
    folders: dict[str, Path], tmp_path: Path, family: str, dtype: str
) -> None:
    stored = getattr(torch, dtype)
    file = save_single_file(stock(family, folders[family]), tmp_path / "half.safetensors", dtype=stored)
    for asked in ("float32", dtype):
        teacher = load(family, file, config=str(folders[family]), dtype=asked)
        assert teacher.denoiser.dtype == getattr(torch, asked)
        assert {value.dtype for value in teacher.vae.parameters()} == {torch.float32}, "SDXL's overflows in float16"
        assert {value.dtype for value in teacher.pipeline.text_encoder.parameters()} == {getattr(torch, asked)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_with_fp16_weights_alone_is_found(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    pipeline = stock("sdxl", folders["sdxl"], torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert list((tmp_path / "half").rglob("*.fp16.safetensors"))
    teacher = load("sdxl", tmp_path / "half", dtype=dtype)
    assert teacher.denoiser.dtype == getattr(torch, dtype)
    pipeline.to(torch.float32).save_pretrained(tmp_path / "half")
    with torch.no_grad():
        for value in pipeline.unet.parameters():
            value.zero_()
    pipeline.save_pretrained(tmp_path / "half", variant="other")
    assert float(next(load("sdxl", tmp_path / "half").denoiser.network.parameters()).abs().max()) > 0
    other = load("sdxl", tmp_path / "half", variant="other").denoiser.network
    assert float(next(other.parameters()).abs().max()) == 0


@pytest.mark.parametrize(
    ("family", "prefix", "part"),
    [
        ("sd15", "cond_stage_model.", "text_encoder"),
        ("sd21", "first_stage_model.", "vae"),
        ("sdxl", "conditioner.", "text_encoder and no text_encoder_2"),
        ("sdxl", "first_stage_model.", "vae"),
    ],
)
def test_a_part_that_a_single_file_lacks_is_named_or_taken_from_the_configuration(
    folders: dict[str, Path], tmp_path: Path, family: str, prefix: str, part: str
) -> None:
    file = save_single_file(stock(family, folders[family]), tmp_path / "part.safetensors", without=prefix)
    bare = shutil.copytree(folders[family], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match=rf"has no {part}, and.*model\.config"):
        load(family, file, config=str(bare))
    whole = load(family, folders[family])
    same(load(family, file, config=str(folders[family])), whole)
    for weights in bare_weights(folders[family]):
        shutil.copy(weights, (bare / weights.parent.name / weights.name).with_suffix(".fp16.safetensors"))
    same(load(family, file, config=str(bare)), whole)


def bare_weights(folder: Path) -> list[Path]:
    """The weights of a folder's parts beside its UNet."""
    return [path for path in folder.rglob("*.safetensors") if path.parent.name != "unet"]


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.", "lacks some of the weights"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.",
            r"lacks 2 weights of text_encoder, such as (text_model\.)?encoder\.layers\.1\.self_attn\.q_proj",
        ),
        ("model.diffusion_model.", "holds a VAE and a text encoder only; expected a whole model"),
    ],
)
def test_a_file_that_lacks_weights_is_refused(
    folders: dict[str, Path], tmp_path: Path, lacking: str, expected: str
) -> None:
    file = save_single_file(stock("sd15", folders["sd15"]), tmp_path / "part.safetensors", without=lacking)
    with pytest.raises(UserError, match=expected):
        load("sd15", file, config=str(folders["sd15"]))


@pytest.mark.parametrize(
    ("wrong", "asked", "expected"),
    [("sdxl", "sd15", "as SDXL does"), ("sd15", "sdxl", "sd15 or sd21"), ("sdxl", "sd21", "sdxl")],
)
def test_a_model_of_another_family_is_refused(
    folders: dict[str, Path], tmp_path: Path, wrong: str, asked: str, expected: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.family.*{expected}"):
        load(asked, folders[wrong])
    file = save_single_file(stock(wrong, folders[wrong]), tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"model\.path"):
        load(asked, file, config=str(folders[asked]))


def test_an_unreadable_configuration_raises_a_readable_error(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_diffusion.trainer.teachers.loading.source.why_offline", lambda: "no connection")
    file = save_single_file(stock("sd15", folders["sd15"]), tmp_path / "model.safetensors")
    with pytest.raises(
        UserError,
        match=r"model\.config: the configuration of .*\.safetensors is on the Hub \(no/where\), which can't be",
    ):
        load("sd15", file, config="no/where")
    with pytest.raises(UserError, match=r"model\.config: .* has no model_index\.json"):
        load("sd15", file, config=str(tmp_path))
    with pytest.raises(UserError, match=r"model\.config: is for a single file"):
        load("sd15", folders["sd15"], config=str(folders["sd15"]))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_pickle_is_refused_unopened(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="pickle.*safetensors"):
        load("sd15", file)


def test_a_folder_of_pickles_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd15"], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="not a complete diffusers folder"):
        load("sd15", folder)


def test_text_encoders_are_gone_from_memory_once_released(folders: dict[str, Path]) -> None:
    teacher = load("sdxl", folders["sdxl"])
    pipeline = teacher.pipeline
    parts = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae.encoder]
    watched = [weakref.ref(part) for part in parts]
    del parts, pipeline
    teacher.release_encoders()
    gc.collect()
    assert [part() for part in watched] == [None] * 3
    teacher.decode(noise(teacher))
