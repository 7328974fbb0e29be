"""Switches for speed change nothing but rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill import assembly
from flash_diffusion.trainer.distill.assembly import Assembly, assemble
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.seeds import stream
from flash_diffusion.trainer.teachers.in_memory import compiled_blocks

TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


def step(recipe: Recipe) -> tuple[Assembly, dict[str, torch.Tensor]]:
    """Return a run's parts after one student step with all terms, and what the step computed."""
    parts = assemble(recipe, Accelerator())
    generator = stream(0, "noise")
    with torch.no_grad():
        for learner in ("student", "critic"):
            for value in parts.trained.parameters[learner].values():
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    z0, conditioning = parts.examples.batch(torch.tensor([0, 3]), "cpu")
    phase = recipe.phases[0].phase()
    rollout = parts.distiller.rollout(z0, conditioning, parts.teacher.unconditional(2), phase, generator)
    done = parts.distiller.student_step(rollout, phase, generator)
    found = {name: value.grad for name, value in parts.trained.parameters["student"].items()}
    return parts, {**found, "z_teacher": rollout.z_teacher, "z_student": done.z_student, **done.terms}


@pytest.fixture
def every_term(recipe_content: dict[str, Any]) -> dict[str, Any]:
    recipe_content["phases"] = [{"name": "all", "updates": 1, "modes": [1, 1, 1, 1], "adversarial": 0.3, "dmd": 0.7}]
    recipe_content["method"]["fake_score"] = "critic"
    return recipe_content


def test_channels_last_changes_rounding_alone(every_term: dict[str, Any], tmp_path: Path) -> None:
    """With LoRAs on convolutions too, whose files keep the usual order."""
    every_term["lora"]["targets"] = ["to_q", "conv1"]
    plain, ordered = (step(parse_recipe({**every_term, "speed": {"channels_last": value}})) for value in (False, True))
    convolution = ordered[0].teacher.denoiser.network.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not plain[0].teacher.denoiser.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert ordered[0].teacher.weights_hash() == plain[0].teacher.weights_hash()
    for name, value in plain[1].items():
        torch.testing.assert_close(ordered[1][name], value, **TOLERANCE)
    assert distil(parse_recipe({**every_term, "speed": {"channels_last": True}}), tmp_path).is_file()


def test_channels_last_is_refused_for_transformers(every_term: dict[str, Any], models: Callable[[str], Path]) -> None:
    every_term["model"] = {"family": "pixart_alpha", "path": str(models("pixart_alpha"))}
    with pytest.raises(UserError, match=r"speed\.channels_last is for UNets.*PixArtTransformer2DModel"):
        assemble(parse_recipe({**every_term, "speed": {"channels_last": True}}), Accelerator())


def test_compiled_blocks_change_rounding_alone(
    every_term: dict[str, Any], models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All roles, checkpointing, the split backward pass, and hidden states, which hooks read from compiled blocks."""
    monkeypatch.setattr(compiled_blocks, "BACKEND", "eager")  # torch's own graphs, run as they are
    every_term["model"] = {"family": "sd3", "path": str(models("sd3"))}
    every_term["method"]["solver"] = "euler"
    every_term["gradient_checkpointing"] = True
    plain, compiled = (step(parse_recipe({**every_term, "speed": {"compile": value}})) for value in (None, "blocks"))
    clock = compiled[0].compiling
    assert clock is not None
    assert clock.count > 3  # teacher, student, critic, with gradients and without
    assert clock.seconds > 0
    networks = [parts.teacher.denoiser.network for parts, _ in (plain, compiled)]
    assert networks[1].state_dict().keys() == networks[0].state_dict().keys()
    assert plain[1].keys() == compiled[1].keys()
    for name, value in plain[1].items():
        torch.testing.assert_close(compiled[1][name], value, **TOLERANCE)


def test_the_blocks_of_a_unet_are_its_transformer_blocks(models: Callable[[str], Path]) -> None:
    network = UNet2DConditionModel.from_pretrained(models("sd15"), subfolder="unet")
    found = compiled_blocks.blocks_of(network)
    assert found == [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]
    assert found


def test_a_run_logs_what_compiling_took(
    every_term: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = compiled_blocks.CompileClock()
    clock.count, clock.seconds = 12, 34.5
    monkeypatch.setattr(assembly, "compile_blocks", lambda network, device: clock)
    assert distil(parse_recipe({**every_term, "speed": {"compile": "blocks"}}), tmp_path).is_file()
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert (entry["compilations"], entry["compile_seconds"]) == (12, 34.5)


def test_compiling_is_refused_where_it_cannot_hold(every_term: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {**every_term, "speed": {"compile": "blocks"}}
    with pytest.raises(UserError, match=r"leave out speed\.compile, or set sharding to none"):
        parse_recipe({**compiled, "sharding": "base"})

    def broken(_graph: Any, _inputs: Any) -> None:
        raise RuntimeError("no C++ compiler here\nsecond line")

    monkeypatch.setattr(compiled_blocks, "BACKEND", broken)
    with pytest.raises(UserError, match=r"torch\.compile does not work on cpu here .*no C\+\+ compiler here.*Triton"):
        assemble(parse_recipe(compiled), Accelerator())


def test_recipes_without_compiling_keep_their_hash(every_term: dict[str, Any]) -> None:
    plain = parse_recipe({**every_term, "speed": {"channels_last": True}})
    assert plain.digest() == parse_recipe({**every_term, "speed": {"channels_last": True, "compile": None}}).digest()
    assert (
        plain.digest() != parse_recipe({**every_term, "speed": {"channels_last": True, "compile": "blocks"}}).digest()
    )
