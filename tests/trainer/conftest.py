"""Tiny random models and pictures, made once for all tests of the trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from flash_diffusion.trainer.config import Recipe, parse_recipe

from ..families.pipelines import save_pipeline, with_older_tokenizers
from ..forks.client import Forks
from .models import picture_folder, tiny_recipe, tiny_stable_diffusion

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion 1.5 as a diffusers folder."""
    return tiny_stable_diffusion(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six random pictures with captions."""
    return picture_folder(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def recipe_content(tiny_model: Path, pictures: Path) -> dict[str, Any]:
    """A recipe that runs in seconds and computes every term."""
    return tiny_recipe(tiny_model, pictures)


@pytest.fixture
def recipe(recipe_content: dict[str, Any]) -> Recipe:
    """The same, checked."""
    return parse_recipe(recipe_content)


@pytest.fixture
def recipe_file(recipe_content: dict[str, Any], tmp_path: Path) -> Path:
    """The same, as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_content))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of a family as a diffusers folder, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = with_older_tokenizers(save_pipeline(family, root / family))
        return made[family]

    return model


@pytest.fixture
def own_precision() -> Iterator[None]:
    """Let a test choose a run's precision: accelerate keeps one for a whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def trainer_forks() -> Iterator[Forks]:
    """Forks of a process that has imported the trainer."""
    forks = Forks([Path(__file__).with_name("imported.py")], os.environ)
    yield forks
    forks.stop()


def trainer_process(*arguments: str | Path) -> subprocess.Popen[str]:
    """``python -m trainer`` in a process of its own, as in a clone."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
