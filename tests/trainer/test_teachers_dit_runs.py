"""Whole distillations of the transformer families: what changes, and that the LoRA works in stock diffusers."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from transformers.utils import logging as transformers_logging

from flash_diffusion.flash_core.denoiser import predict_z0
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise
from flash_diffusion.trainer.config import ModelSection, parse_recipe
from flash_diffusion.trainer.distill.loop import Run, distil
from flash_diffusion.trainer.distill.plan import print_plan
from flash_diffusion.trainer.evaluate.generate import decode_pictures
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.teachers import load_teacher

from ..families.pipelines_dit import save_pipeline
from .models import tiny_recipe

FAMILIES = ("pixart_alpha", "pixart_sigma", "sd3", "sd35")
FLOWS = ("sd3", "sd35")
BASES = {"pixart_alpha": "pixart", "pixart_sigma": "pixart-sigma", "sd3": "sd3", "sd35": "sd35"}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Collect the warnings of diffusers and transformers, whose loggers do not propagate."""
    for library in (diffusers_logging, transformers_logging):
        library.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    for library in (diffusers_logging, transformers_logging):
        library.disable_propagation()


@pytest.fixture(scope="module", params=FAMILIES)
def distilled(
    request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A run of 5 updates with every term, a critic and gradient checkpointing, and its base as it was before."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    model = save_pipeline(family, folder / "tiny")
    recipe = tiny_recipe(model, pictures, gradient_checkpointing=True)
    recipe["model"] = {"family": family, "path": str(model)}
    recipe["data"]["resolution"] = 64
    recipe["method"] |= {"solver": "euler" if family in FLOWS else "dpmpp_2m", "fake_score": "critic"}
    recipe["optimizer"]["lr"] = 0.02  # so that the LoRA does something
    run = Run(parse_recipe(recipe), folder / "run", Accelerator(), None)
    network = run.parts.teacher.denoiser.network
    before = {name: value.clone() for name, value in network.state_dict().items() if ".lora_" not in name}
    conditioning = run.parts.examples.batch(torch.tensor([0, 1]), "cpu")[1]
    lora = run.train()
    return SimpleNamespace(
        family=family, model=model, run=run, lora=lora, before=before, conditioning=conditioning, network=network
    )


def forward(network: Any, distilled: SimpleNamespace, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network's own call, with nothing of this package in it."""
    conditioning = distilled.conditioning
    if distilled.family in FLOWS:
        return network(
            z, conditioning.cross_attention, conditioning.vector, t, return_dict=False
        )[0]  # fmt: skip
    sizes = conditioning.size_ids
    added = {"resolution": None, "aspect_ratio": None}
    if sizes is not None:
        added = {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
    mask = conditioning.attention_mask
    output = network(
        z, conditioning.cross_attention, t, added_cond_kwargs=added, encoder_attention_mask=mask, return_dict=False
    )
    return output[0].chunk(2, dim=1)[0]


def run_card(lora: Path, pipe: DiffusionPipeline, *, draw: bool) -> Any:
    """Run the Python of the model card on a pipeline: what loads the LoRA, and what draws the picture it gives back."""
    code = (lora.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]
    loading, scheduler, drawing = code.partition("pipe.scheduler")
    names: dict[str, Any] = {"pipe": pipe, "prompt": "red ball"}
    exec(loading, names)  # noqa: S102
    if draw:
        torch.manual_seed(5)
        exec(scheduler + drawing, names)  # noqa: S102
    return names.get("image")


def test_only_the_adapters_and_heads_change(distilled: SimpleNamespace) -> None:
    after = {name: value for name, value in distilled.network.state_dict().items() if ".lora_" not in name}
    assert after.keys() == distilled.before.keys()
    assert all(torch.equal(value, distilled.before[name]) for name, value in after.items())
    trained = distilled.run.parts.trained.parameters
    assert set(trained) == {"student", "discriminator", "critic"}
    for role in ("student", "critic"):
        ups = [float(value.detach().abs().max()) for name, value in trained[role].items() if ".lora_B." in name]
        # In the last joint block the text's queries lead nowhere, so that one layer stays as it was.
        assert sum(up == 0 for up in ups) <= (1 if distilled.family in FLOWS else 0)


def test_every_default_layer_is_in_the_file(distilled: SimpleNamespace) -> None:
    file = read_lora(distilled.lora)
    assert file.dialect == "diffusers"
    assert not file.unknown
    assert file.metadata is not None
    assert file.metadata.base == BASES[distilled.family]
    flow = distilled.family in FLOWS
    assert file.metadata.process == ("flow" if flow else "vp")
    assert file.metadata.timesteps[4] == pytest.approx((1000, 900, 750, 500) if flow else (999, 749, 499, 249))
    targets = distilled.run.parts.teacher.default_targets
    adapted = {module.path for module in file.modules.values()}
    layers = [
        name.removesuffix(".base_layer")
        for name, module in distilled.network.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in name
    ]
    wanted = {name for name in layers if any(name == target or name.endswith(f".{target}") for target in targets)}
    assert adapted == wanted
    if not flow:
        assert adapted == set(layers)


def test_stock_diffusers_loads_it_with_the_same_output(
    distilled: SimpleNamespace, warnings: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded as the card says."""
    teacher = distilled.run.parts.teacher
    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 499.0])
    with torch.no_grad():
        bare = teacher.denoiser.predict(z, t, distilled.conditioning)
        with distilled.run.parts.average.applied(), teacher.denoiser.role("student"):
            trained = teacher.denoiser.predict(z, t, distilled.conditioning)
    pipeline = DiffusionPipeline.from_pretrained(distilled.model)
    monkeypatch.chdir(distilled.lora.parent.parent)
    run_card(distilled.lora, pipeline, draw=False)
    with torch.no_grad():
        loaded = forward(pipeline.transformer, distilled, z, t)
    assert not torch.allclose(trained, bare, atol=1e-2)
    torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=1e-5)
    # diffusers says of every LoRA without layers of text encoders that it has none.
    assert not [text for text in warnings.messages if not text.startswith("No LoRA keys associated to CLIP")]


def test_the_cards_way_to_draw_is_ours(distilled: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, run as it stands, draws the picture of our few-step sampler from the same stream of noise."""
    pipe = DiffusionPipeline.from_pretrained(distilled.model)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.chdir(distilled.lora.parent.parent)
    image = run_card(distilled.lora, pipe, draw=True)
    teacher, denoiser = distilled.run.parts.teacher, distilled.run.parts.teacher.denoiser
    conditioning = load_teacher(distilled.run.recipe.model, resolution=64).encode_prompts(["red ball"])
    timesteps = trailing_timesteps(denoiser.process, 4)
    alphas, sigmas = denoiser.process.alpha_sigma(torch.tensor(timesteps, dtype=torch.float64))
    stream = torch.Generator().manual_seed(5)
    z = torch.randn(1, *teacher.latent_shape, generator=stream)
    with torch.no_grad(), distilled.run.parts.average.applied(), denoiser.role("student"):
        latents = few_step_sample(
            lambda z, index: predict_z0(denoiser, z, torch.tensor([timesteps[index]]), conditioning),
            z,
            alphas.tolist(),
            sigmas.tolist(),
            generator_noise(z, stream),
        )
    ours = decode_pictures(teacher, latents)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(image) / 255
    assert theirs.shape == (64, 64, 3)
    assert theirs.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=0.6 / 255)


def test_a_style_lora_is_merged_into_the_teacher(distilled: SimpleNamespace) -> None:
    """The exported LoRA as a style: merged into the teacher, it makes the teacher compute what the student does."""
    styles = [{"path": distilled.lora, "strength": 1.0}]
    section = ModelSection(family=distilled.family, path=str(distilled.model), style_lora=styles)  # type: ignore[arg-type]
    teacher = distilled.run.parts.teacher
    z = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 499.0])
    with torch.no_grad():
        with distilled.run.parts.average.applied(), teacher.denoiser.role("student"):
            student = teacher.denoiser.predict(z, t, distilled.conditioning)
        worn = load_teacher(section, resolution=64).denoiser.predict(z, t, distilled.conditioning)
    torch.testing.assert_close(worn, student, atol=1e-5, rtol=1e-5)


RECIPES = {"pixart": "pixart_alpha", "sd3": "sd3"}


@pytest.mark.slow
@pytest.mark.usefixtures("own_precision")
@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_recipe_runs_with_only_model_and_data_changed(name: str, pictures: Path, tmp_path: Path) -> None:
    """But for the number of updates; in bfloat16, as it says, with the plan, a preview and the card."""
    model = save_pipeline(RECIPES[name], tmp_path / "tiny")
    changes = [f"model.path={model}", "data.source=folder", f"data.path={pictures}", "data.resolution=64"]
    recipe = load_recipe(name, [*changes, *(f"phases.{phase}.updates=1" for phase in range(4))])
    assert (recipe.model.dtype, recipe.precision) == ("bfloat16", "bf16")
    plan = Console(record=True, width=120, file=io.StringIO())
    print_plan(recipe, plan)
    text = plan.export_text()
    flow = name in FLOWS
    assert f"{16 if flow else 4} x 8 x 8 per sample" in text
    assert ("timesteps 1000/900/750/500" if flow else "timesteps 999/749/499/249") in text
    file = read_lora(distil(recipe, tmp_path / "run"))
    assert file.ranks == (64,)
    assert file.metadata is not None
    assert file.metadata.training["updates"] == "4"
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 1
