"""Transformer teachers (PixArt, SD3, SD3.5): the stock pipelines' conditions and pictures, and what they refuse."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from flash_diffusion.flash_core.denoiser import Conditioning, guided_z0, predict_z0
from flash_diffusion.flash_core.distiller import PUBLISHED_PHASES, Distiller, DistillerSettings
from flash_diffusion.flash_core.grid import trailing_fractions
from flash_diffusion.flash_core.process import FlowProcess, VPProcess
from flash_diffusion.trainer.config import ModelSection, parse_recipe
from flash_diffusion.trainer.distill.assembly import add_adapters, assemble
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import RECIPES, load_recipe
from flash_diffusion.trainer.teachers import family as teacher_of
from flash_diffusion.trainer.teachers import load_teacher, outline_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.pipelines_dit import CLIP_WIDTHS, VAE_FACTORS, save_pipeline
from ..families.single_file_dit import native_sd3
from .models import tiny_recipe

FAMILIES = ("pixart_alpha", "pixart_sigma", "sd3", "sd35")
FLOWS = ("sd3", "sd35")
PROMPTS = ["  Red ball", "a yellow star"]  # PixArt's pipelines lower and strip their captions
SIZE = 64  # pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny models by family, each made once."""
    made: dict[tuple[str, bool], Path] = {}

    def make(family: str, *, t5: bool = True) -> Path:
        if (family, t5) not in made:
            made[family, t5] = save_pipeline(family, tmp_path_factory.mktemp(family) / "tiny", t5=t5)
        return made[family, t5]

    return make


def load(family: str, path: Path, **fields: Any) -> Teacher:
    """A teacher at the test's size."""
    return load_teacher(ModelSection(family=family, path=str(path), **fields), resolution=SIZE)


def stock(path: Path, **parts: Any) -> DiffusionPipeline:
    """The stock pipeline, without progress bars."""
    pipeline = DiffusionPipeline.from_pretrained(path, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect the libraries' warnings."""
    messages: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft", "accelerate")]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(listener)


def batch(teacher: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and timesteps."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, *teacher.latent_shape, generator=generator), torch.tensor([990.0, 249.0])


# -- the same as diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "steps", "t5"),
    [("pixart_alpha", 16, True), ("pixart_sigma", 16, True), ("sd3", 8, True), ("sd3", 8, False), ("sd35", 8, True)],
)
def test_the_rollout_is_the_stock_pipelines(folder: Callable[..., Path], family: str, steps: int, t5: bool) -> None:
    path = folder(family, t5=t5)
    teacher = load(family, path)
    noise, _ = batch(teacher)
    settings = DistillerSettings(teacher_steps=steps, solver="euler" if family in FLOWS else "dpmpp_2m")
    ours = Distiller(teacher.denoiser, settings).teacher_solution(
        noise, teacher.encode_prompts(PROMPTS), teacher.unconditional(2), torch.full((2,), 4.0)
    )
    if family in FLOWS:
        pipeline = stock(path, **({} if t5 else {"text_encoder_3": None, "tokenizer_3": None}))
        options: dict[str, Any] = {"sigmas": trailing_fractions(steps)}
    else:
        pipeline = stock(path)
        trailing = {"timestep_spacing": "trailing"}
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **trailing)
        options = {"num_inference_steps": steps, "clean_caption": False, "use_resolution_binning": False}
    theirs = pipeline(
        PROMPTS, latents=noise.clone(), guidance_scale=4.0, height=SIZE, width=SIZE, output_type="latent", **options
    ).images
    # An untrained epsilon network leaves z0 = z / alpha, hundreds large, so errors are counted in standard deviations.
    spread = float(theirs.std())
    assert spread > 0.1
    torch.testing.assert_close(ours / spread, theirs / spread, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_the_conditions_counts(folder: Callable[..., Path], family: str) -> None:
    """The comparison with the pipelines would not notice a condition that the tiny network ignores."""
    teacher = load(family, folder(family))
    z, t = batch(teacher)
    conditioning = teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        output = teacher.denoiser.predict(z, t, conditioning)
        for name in ("cross_attention", "attention_mask", "vector", "size_ids"):
            value = getattr(conditioning, name)
            if value is not None:
                changed = torch.ones_like(value) if name == "attention_mask" else value.roll(1, 0) * 1.5
                other = teacher.denoiser.predict(z, t, replace(conditioning, **{name: changed}))
                assert float((other - output).abs().max()) > 1e-4, name


def test_pixart_reads_lowered_captions_with_their_mask_and_the_size(folder: Callable[..., Path]) -> None:
    for family, length in (("pixart_alpha", 120), ("pixart_sigma", 300)):
        teacher = load(family, folder(family))
        conditioning, empty = teacher.encode_prompts(PROMPTS), teacher.unconditional(3)
        assert conditioning.cross_attention is not None
        assert conditioning.attention_mask is not None
        assert empty.attention_mask is not None
        assert conditioning.cross_attention.shape == (2, length, 32)
        assert 1 < int(conditioning.attention_mask[0].sum()) < length
        assert empty.attention_mask.tolist() == [[1] + [0] * (length - 1)] * 3  # the end of the text alone
        same = teacher.encode_prompts(["red ball"]).cross_attention
        torch.testing.assert_close(conditioning.cross_attention[:1], same)
        if family == "pixart_alpha":
            assert conditioning.size_ids is not None
            assert conditioning.size_ids.tolist() == [[SIZE, SIZE, 1.0]] * 2
        else:
            assert conditioning.size_ids is None


def test_sd3_joins_three_encoders(folder: Callable[..., Path]) -> None:
    path = folder("sd3")
    conditioning = load("sd3", path).encode_prompts(PROMPTS)
    without = load("sd3", path, t5=False).encode_prompts(PROMPTS)
    assert conditioning.cross_attention is not None
    assert without.cross_attention is not None
    clip, t5 = conditioning.cross_attention.split([16, 256], dim=1)
    assert float(clip[..., sum(CLIP_WIDTHS) :].abs().max()) == 0  # padded to T5's width
    assert float(t5.abs().max()) > 0.1
    torch.testing.assert_close(without.cross_attention[:, :16], clip)
    zeros = without.cross_attention[:, 16:]
    assert zeros.shape[1] in (16, 256)  # diffusers 0.35 stands in for T5 with CLIP's length, newer ones with T5's
    assert float(zeros.abs().max()) == 0
    torch.testing.assert_close(without.vector, conditioning.vector)


def test_a_model_without_t5_is_noticed(
    folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Saved without it, or with its folder left out of a download."""
    partial = tmp_path / "partial"
    shutil.copytree(folder("sd3"), partial, ignore=shutil.ignore_patterns("text_encoder_3"))
    for path in (folder("sd3", t5=False), partial):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            hidden = load("sd3", path).encode_prompts(PROMPTS).cross_attention
        assert hidden is not None
        assert float(hidden[:, 16:].abs().max()) == 0
        assert "has no T5" in caplog.text


@pytest.mark.parametrize("family", ["pixart_alpha", "sd3"])
def test_guidance_in_one_batch_is_two_calls(folder: Callable[..., Path], family: str) -> None:
    """Masks, sizes and pooled vectors stay with their own branch."""
    teacher = load(family, folder(family))
    z, t = batch(teacher)
    conditioning, empty = teacher.encode_prompts(PROMPTS), teacher.unconditional(2)
    with torch.no_grad():
        both = guided_z0(teacher.denoiser, z, t, conditioning, empty, torch.tensor([2.0, 5.0]))
        first, second = (predict_z0(teacher.denoiser, z, t, part) for part in (conditioning, empty))
    scale = float(both.std())
    expected = second + torch.tensor([2.0, 5.0]).reshape(2, 1, 1, 1) * (first - second)
    torch.testing.assert_close(both / scale, expected / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_and_latents_are_the_stock_pipelines(folder: Callable[..., Path], family: str) -> None:
    teacher = load(family, folder(family))
    vae = stock(folder(family)).vae
    scaling, shift = VAE_FACTORS[family]
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
        latents = (mode - (shift or 0.0)) * scaling
        torch.testing.assert_close(teacher.encode(images), latents)
        torch.testing.assert_close(teacher.decode(latents), vae.decode(mode).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_is_silent(folder: Callable[..., Path], family: str, dtype: str) -> None:
    """No weight is missing, none is left over."""
    with heard() as messages:
        load(family, folder(family), dtype=dtype)
        outline_teacher(ModelSection(family=family, path=str(folder(family))), SIZE)
    assert messages == []


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_has_the_models_facts(folder: Callable[..., Path], family: str) -> None:
    teacher = load(family, folder(family))
    outline = outline_teacher(ModelSection(family=family, path=str(folder(family))), SIZE)
    assert outline.latent_shape == teacher.latent_shape == (16 if family in FLOWS else 4, 8, 8)
    assert outline.parameters == sum(value.numel() for value in teacher.denoiser.network.parameters())
    process = teacher.denoiser.process
    if family in FLOWS:
        assert process == FlowProcess(3.0)
    else:
        assert isinstance(process, VPProcess)
        assert process.prediction == "epsilon"
        theirs = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod
        torch.testing.assert_close(process.alphas_cumprod.float(), theirs)


@pytest.mark.parametrize("family", ["pixart_alpha", "pixart_sigma"])
def test_the_published_folders_name_an_older_class(folder: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Their transformers were saved as Transformer2DModel, alpha's without a word on sizes."""
    path = tmp_path / "model"
    shutil.copytree(folder(family), path)
    index, config = path / "model_index.json", path / "transformer" / "config.json"
    index.write_text(index.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    fields = json.loads(config.read_text()) | {"_class_name": "Transformer2DModel", "only_cross_attention": False}
    if family == "pixart_alpha":
        del fields["use_additional_conditions"]
    config.write_text(json.dumps(fields))
    section = ModelSection(family=family, path=str(path))
    with heard() as messages:
        older = load(family, path)
        outline = outline_teacher(section, SIZE)
    assert messages == []
    newer = load(family, folder(family))
    assert outline.parameters == sum(value.numel() for value in newer.denoiser.network.parameters())
    z, t = batch(older)
    with torch.no_grad():
        got = older.denoiser.predict(z, t, older.encode_prompts(PROMPTS))
        assert torch.equal(got, newer.denoiser.predict(z, t, newer.encode_prompts(PROMPTS)))


PIXART = {
    "_class_name": "Transformer2DModel",
    "attention_bias": True,
    "caption_channels": 4096,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
    "sample_size": 128,
}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "caption_projection_dim": 1536,
    "num_attention_heads": 24,
    "num_layers": 24,
    "pos_embed_max_size": 192,
}
SD35 = SD3 | {"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384, "qk_norm": "rms_norm"}


@pytest.mark.parametrize(
    ("name", "config", "base", "lora"),
    [
        ("pixart", PIXART, 0.61, 55.2),
        ("pixart_sigma", PIXART | {"use_additional_conditions": False, "interpolation_scale": 2}, 0.61, 55.1),
        ("sd3", SD3, 2.08, 37.6),
        ("sd35", SD35, 2.47, 47.8),
    ],
)
def test_the_published_sizes(
    folder: Callable[..., Path], tmp_path: Path, name: str, config: dict[str, Any], base: float, lora: float
) -> None:
    """The numbers in the published transformers' files (in 1e9) and in the recipes' LoRAs (in 1e6)."""
    recipe = load_recipe(name, [f"model.path={tmp_path / 'model'}"])
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder(recipe.model.family), tmp_path / "model", ignore=ignored)
    (tmp_path / "model" / "transformer" / "config.json").write_text(json.dumps(config))
    outline = outline_teacher(recipe.model, recipe.data.resolution)
    stored = sum(value.numel() for value in outline.denoiser.network.state_dict().values())
    assert stored / 1e9 == pytest.approx(base, rel=0.01)
    assert outline.latent_shape == (16 if name in FLOWS else 4, 128, 128)
    add_adapters(outline.denoiser, recipe, ())
    trained = sum(value.numel() for value in outline.denoiser.adapter_parameters("student").values())
    assert trained / 1e6 == pytest.approx(lora, abs=0.05)
    preset = (RECIPES / "presets" / "paper.yaml").read_text().partition(f"\n  {recipe.model.family}:")[2]
    line = next(line for line in preset.splitlines() if "rank:" in line)
    assert f"{lora} M parameters" in line


# -- features, precision, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_blocks_image_tokens_as_maps(folder: Callable[..., Path], family: str) -> None:
    teacher = load(family, folder(family))
    denoiser = teacher.denoiser
    network = denoiser.network
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, teacher.latent_shape[0], 8, 12, generator=generator), torch.tensor([700.0, 10.0])
    conditioning = teacher.encode_prompts(PROMPTS)
    features = denoiser.features(z, t, conditioning)
    width = network.config.num_attention_heads * network.config.attention_head_dim
    assert [tuple(feature.shape) for feature in features] == [(2, width, 4, 6)] * 2
    # Undoing what follows the last block by hand gives the prediction: the tokens are in their places.
    if family in FLOWS:
        vector = network.time_text_embed(t, conditioning.vector)
        tokens = network.proj_out(network.norm_out(features[-1].flatten(2).transpose(1, 2), vector))
        patches = tokens.reshape(2, 4, 6, 2, 2, 16)
        by_hand = torch.einsum("nhwpqc->nchpwq", patches).reshape(2, 16, 8, 12)
        torch.testing.assert_close(by_hand, denoiser.predict(z, t, conditioning), atol=1e-5, rtol=1e-5)
    leaf = z.clone().requires_grad_()
    first = denoiser.features(leaf, t, conditioning)[0]
    assert float(torch.autograd.grad(first.square().sum(), leaf)[0].abs().max()) > 0
    assert not any(module._forward_hooks for module in network.modules())


def test_a_deep_network_is_read_at_four_depths() -> None:
    from diffusers import SD3Transformer2DModel

    from flash_diffusion.trainer.teachers.families.stable_diffusion_3 import SD3Denoiser

    with torch.device("meta"):
        network = SD3Transformer2DModel(num_layers=24, num_attention_heads=2, attention_head_dim=8)
    blocks = list(network.transformer_blocks)
    chosen = SD3Denoiser(network, FlowProcess(3.0)).feature_blocks()
    assert [blocks.index(block) for block in chosen] == [4, 9, 14, 19]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(folder: Callable[..., Path], pictures: Path, family: str) -> None:
    """All terms with a critic, the roles moving on while blocks are recomputed."""
    content = tiny_recipe(folder(family), pictures)
    content["model"]["family"] = family
    content["data"]["resolution"] = SIZE
    content["method"] |= {"fake_score": "critic", "solver": "euler" if family in FLOWS else "dpmpp_2m"}
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
        step = parts.distiller.student_step(rollout, phase, generator)
        assert set(step.terms) == {"distillation", "adversarial", "dmd", "total"}
        gradients.append({name: value.grad for name, value in student.items()})
    for name, plain in gradients[0].items():
        assert plain is not None, name
        torch.testing.assert_close(gradients[1][name], plain, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_full_precision(folder: Callable[..., Path], family: str, dtype: str) -> None:
    whole, half = load(family, folder(family)), load(family, folder(family), dtype=dtype)
    assert half.denoiser.dtype == getattr(torch, dtype)
    assert half.vae.dtype == torch.float32
    z, t = batch(whole)
    for teacher in (whole, half):
        teacher.denoiser.add_adapter("student", 4, 4, teacher.default_targets)
    assert {value.dtype for value in half.denoiser.adapter_parameters("student").values()} == {torch.float32}
    with torch.no_grad(), whole.denoiser.role("student"), half.denoiser.role("student"):
        expected = whole.denoiser.predict(z, t, whole.encode_prompts(PROMPTS))
        got = half.denoiser.predict(z, t, half.encode_prompts(PROMPTS))
    assert got.dtype == torch.float32
    assert float((got - expected).std() / expected.std()) < 0.05


@pytest.mark.parametrize("family", ["pixart_alpha", "sd3"])
def test_release_encoders_frees_the_encoders(folder: Callable[..., Path], family: str) -> None:
    teacher = load(family, folder(family))
    empty = teacher.unconditional(2)
    teacher.release_encoders()
    assert torch.equal(teacher.unconditional(2).cross_attention, empty.cross_attention)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="released"):
        teacher.encode_prompts(["x"])


# -- single files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FLOWS)
@pytest.mark.parametrize("t5", [True, False], ids=["t5", "no t5"])
def test_a_single_file_is_the_folder(
    folder: Callable[..., Path], tmp_path: Path, family: str, t5: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The original's key names: joint_blocks with fused qkv, text_encoders.clip_l and so on."""
    path = folder(family)
    save_file(native_sd3(path, t5=t5), tmp_path / "model.safetensors")
    config = tmp_path / "config"
    left_out = () if t5 else ("text_encoder_3*",)  # else the weights come from there
    shutil.copytree(path, config, ignore=shutil.ignore_patterns("diffusion_pytorch_model*", *left_out))
    with heard() as messages:
        teacher = load(family, tmp_path / "model.safetensors", config=str(config))
    assert messages == []
    assert ("has no T5" in caplog.text) != t5
    expected = load(family, path, t5=t5)
    z, time = batch(teacher)
    conditioning, wanted = teacher.encode_prompts(PROMPTS), expected.encode_prompts(PROMPTS)
    torch.testing.assert_close(conditioning.cross_attention, wanted.cross_attention)
    torch.testing.assert_close(conditioning.vector, wanted.vector)
    with torch.no_grad():
        got = teacher.denoiser.predict(z, time, conditioning)
        torch.testing.assert_close(got, expected.denoiser.predict(z, time, wanted))
        torch.testing.assert_close(teacher.decode(z), expected.decode(z))


def test_a_single_file_says_its_own_family(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"model\.safetensors is no SD3 or SD3\.5 checkpoint"):
        load("sd3", path, config=str(folder("sd3")))
    save_file(native_sd3(folder("sd35")), path)
    with pytest.raises(UserError, match="model is of the family sd35, not sd3"):
        load("sd3", path, config=str(folder("sd3")))
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load("sd3", path, config=str(folder("sd3")))


def test_a_single_file_of_pixart_is_refused_in_words(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "pixart.safetensors")
    with pytest.raises(UserError, match=r"pixart\.safetensors is a single file.*diffusers can't read.*folder"):
        load("pixart_sigma", tmp_path / "pixart.safetensors")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        ("sd3", "sd35", "is of the family sd3, not sd35; set model.family: sd3"),
        ("sd35", "sd3", "is of the family sd35, not sd3"),
        ("pixart_alpha", "pixart_sigma", "model.family: pixart_alpha"),
        ("pixart_alpha", "sd3", "is PixArtTransformer2DModel; expected an SD3"),
        ("sd3", "pixart_alpha", "is SD3Transformer2DModel; expected a PixArt"),
    ],
)
def test_another_family_is_named(folder: Callable[..., Path], given: str, asked: str, expected: str) -> None:
    for call in (load_teacher, outline_teacher):
        with pytest.raises(UserError, match=expected):
            call(ModelSection(family=asked, path=str(folder(given))), resolution=SIZE)


def test_dynamic_shifting_is_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(folder("sd3"), path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dynamic_shifting": True}))
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        load("sd3", path)


@pytest.mark.parametrize("family", ["pixart_sigma", "sd3"])
def test_a_resolution_of_half_a_patch_raises_an_error(folder: Callable[..., Path], family: str) -> None:
    for call in (load_teacher, outline_teacher):
        with pytest.raises(UserError, match=r"data\.resolution: 72 .* multiple of 16 pixels, such as 64"):
            call(ModelSection(family=family, path=str(folder(family))), resolution=72)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("pixart_alpha", {"vector": torch.zeros(2, 4)}),
        ("pixart_alpha", {"residuals": (torch.zeros(2, 4),)}),
        ("pixart_alpha", {"size_ids": None}),
        ("pixart_sigma", {"size_ids": torch.zeros(2, 3)}),
        ("sd3", {"attention_mask": torch.ones(2, 4)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_conditions_of_other_families_raise_an_error(
    folder: Callable[..., Path], family: str, fields: dict[str, Any]
) -> None:
    teacher = load(family, folder(family))
    z, t = batch(teacher)
    with pytest.raises(ValueError, match="takes|needs"):
        teacher.denoiser.predict(z, t, replace(teacher.encode_prompts(PROMPTS), **fields))


def test_sd3_adds_the_residuals_of_a_controlnet(folder: Callable[..., Path]) -> None:
    """To the image's tokens after each block but the last, as the network itself says."""
    teacher = load("sd3", folder("sd3"))
    z, t = batch(teacher)
    conditioning = teacher.encode_prompts(PROMPTS)
    residual = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = teacher.denoiser.predict(z, t, replace(conditioning, residuals=(residual,)))
        theirs = teacher.denoiser.network(
            z, conditioning.cross_attention, conditioning.vector, t, [residual], return_dict=False
        )[0]
        bare = teacher.denoiser.predict(z, t, conditioning)
    assert torch.equal(got, theirs)
    assert float((got - bare).abs().max()) > 0.1


def test_conditions_survive_rows_and_cat(folder: Callable[..., Path]) -> None:
    teacher = load("pixart_alpha", folder("pixart_alpha"))
    conditioning = teacher.encode_prompts(PROMPTS)
    joined = Conditioning.cat([conditioning, teacher.unconditional(1)])
    assert len(joined) == 3
    again = joined.rows(torch.tensor([0, 1]))
    assert torch.equal(again.attention_mask, conditioning.attention_mask)  # type: ignore[arg-type]


def test_single_file_weights_equal_the_folders(folder: Callable[..., Path]) -> None:
    """The base is the file's, bit for bit."""
    path = folder("sd35")
    weights = load_file(path / "transformer" / "diffusion_pytorch_model.safetensors")
    network = load("sd35", path).denoiser.network.state_dict()
    assert network.keys() == weights.keys()
    assert all(torch.equal(network[name], value) for name, value in weights.items())


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "teacher_steps", "guidance", "updates", "solver"),
    [
        ("pixart", "pixart_alpha", 16, (2, 9), 10_000, "dpmpp_2m"),
        ("pixart_sigma", "pixart_sigma", 16, (2, 9), 10_000, "dpmpp_2m"),
        ("sd3", "sd3", 32, (7, 13), 5_000, "euler"),
        ("sd35", "sd35", 32, (7, 13), 5_000, "euler"),
    ],
)
def test_the_recipes_have_the_papers_constants(
    name: str, family: str, teacher_steps: int, guidance: tuple[float, float], updates: int, solver: str
) -> None:
    recipe = load_recipe(name)
    assert recipe.model.family == family
    assert recipe.model.path == teacher_of(family).default_config
    assert [phase.phase() for phase in recipe.phases] == list(PUBLISHED_PHASES)
    assert [phase.updates for phase in recipe.phases] == [updates] * 4
    assert recipe.method.settings() == DistillerSettings(teacher_steps, solver, guidance)  # type: ignore[arg-type]
    assert (recipe.lora.rank, recipe.lora.alpha) == (64, 64)
    assert recipe.lora.targets == list(teacher_of(family).default_targets)
    assert (recipe.optimizer.lr, recipe.optimizer.discriminator_lr) == (1e-5, 1e-5)
