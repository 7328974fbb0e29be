"""The same samples in an update give the same weights, however many processes share them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError

from ..forks.client import Forks
from .models import tiny_recipe
from .sharing import DISTIL, run_shared
from .test_resume import ALL_TERMS

EQUAL = 1e-6
SAMPLES = 4  # of a batch, in all processes together
# Not the relativistic loss: the gradient of its heads' last bias is 0, and AdamW makes steps of rounding errors.
EVERY_TERM = {
    **ALL_TERMS,
    "method": {**ALL_TERMS["method"], "adversarial": "hinge"},
    "optimizer": {"lr": 1e-5, "discriminator_lr": 1e-5, "critic_lr": 1e-5},  # as published
    "checkpoint": {"every": 1, "keep": 9},
    "ema": 0.5,
}


def recipe_of(model: Path, pictures: Path, processes: int, **fields: Any) -> dict[str, Any]:
    """The recipe with which ``processes`` processes share batches of ``SAMPLES``."""
    return {**tiny_recipe(model, pictures), **EVERY_TERM, "batch_size": SAMPLES // processes, **fields}


def run_processes(forks: Forks, content: dict[str, Any], folder: Path, processes: int, *options: str) -> str:
    """Run a recipe in several processes and return what they print."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content))
    return run_shared(forks, processes, *DISTIL, file, "--output", folder, *options)


def trained(run: Path) -> dict[str, torch.Tensor]:
    """Everything that trained, with the optimisers' moments, as the last checkpoint holds it."""
    return load_file(checkpoint.checkpoints(run)[-1] / checkpoint.TENSORS)


def assert_same_weights(run: Path, other: Path) -> None:
    """All weights and moments are equal within 1e-6; the weights of all parts have moved."""
    ours, theirs, before = (
        trained(run),
        trained(other),
        load_file(checkpoint.checkpoints(other)[0] / checkpoint.TENSORS),
    )
    assert ours.keys() == theirs.keys()
    for part in ("student", "average", "discriminator", "critic"):
        moved = [(theirs[name] - before[name]).abs().max() for name in before if name.startswith(f"{part}/")]
        assert max(moved) > 5 * EQUAL, part
    apart = {name: (ours[name] - value).abs() > EQUAL for name, value in theirs.items()}
    heads = torch.cat([value.flatten() for name, value in apart.items() if name.startswith("discriminator/")])
    # AdamW's first step is the gradient's sign, and a few of the heads' gradients are nothing but rounding errors.
    assert heads.float().mean() < 1e-4
    assert not [name for name, value in apart.items() if not name.startswith("discriminator/") and value.any()]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("shared") / "alone"
    distil(parse_recipe(recipe_of(tiny_model, pictures, 1)), folder)
    return folder


@pytest.mark.slow
def test_four_processes_that_share_a_batch_train_the_weights_of_one(
    trainer_forks: Forks, tiny_model: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    """All terms; of four processes with one sample each, most have none of the samples on which a term acts."""
    run_processes(trainer_forks, recipe_of(tiny_model, pictures, 4), tmp_path / "run", 4)
    assert_same_weights(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_shared_base_trains_the_weights_of_a_whole_one(
    trainer_forks: Forks, tiny_model: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    fields = {"sharding": "base", "gradient_checkpointing": True}
    text = run_processes(trainer_forks, recipe_of(tiny_model, pictures, 2, **fields), tmp_path / "run", 2)
    assert "are shared among 2 processes" in text
    assert_same_weights(tmp_path / "run", alone)
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 1


@pytest.mark.slow
def test_a_run_goes_on_with_two_processes_and_trains_the_weights_of_one(
    trainer_forks: Forks, tiny_model: Path, pictures: Path, alone: Path, tmp_path: Path
) -> None:
    """From the first update on, with all terms."""
    shutil.copytree(checkpoint.checkpoint_path(alone, 1), checkpoint.checkpoint_path(tmp_path / "run", 1))
    text = run_processes(trainer_forks, recipe_of(tiny_model, pictures, 1), tmp_path / "run", 2, "--resume")
    assert "processes before: 1, now: 2. An update keeps its samples: each process now takes 2 samples" in text
    assert_same_weights(tmp_path / "run", alone)


def test_sharding_of_one_process_is_refused(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sharding: base shares .* but there is one process"):
        distil(parse_recipe({**recipe_content, "sharding": "base"}), tmp_path)
    recorded = {**recipe_content, "sharding": "base", "trajectories": {"count": 2}}
    with pytest.raises(UserError, match=r"set trajectories.count to 0, or sharding to none"):
        parse_recipe(recorded)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed does not work here: its engine owns one optimiser"),
        ("ACCELERATE_USE_FSDP", "FSDP plugin does not work here: .*set sharding: base"),
    ],
)
def test_engines_that_would_break_a_step_are_refused(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, message: str
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=message):
        distil(parse_recipe(recipe_content), tmp_path)
