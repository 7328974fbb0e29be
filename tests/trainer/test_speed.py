"""Switches for speed change nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill.assembly import Assembly, assemble
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.seeds import stream

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
