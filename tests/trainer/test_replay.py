"""The refreshed bank of trajectories: uses, rounds, files, and the same bits after a stop."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.data.batches.rollouts import Rollouts
from flash_diffusion.trainer.data.batches.rounds import Rounds
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError

from ..forks.client import Forks
from .sharing import DISTIL, run_shared
from .test_resume import ALL_TERMS, assert_same_file


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_each_trajectory_is_used_as_often_as_the_recipe_says(capacity: int, reuse: int, batch: int, seed: int) -> None:
    reuse = min(reuse, capacity)
    rounds = Rounds(capacity, reuse, batch, seed)
    used: Counter[int] = Counter()
    for number in range(math.ceil(4 * capacity * reuse / batch)):
        index = rounds.indices(number)
        assert len(index) == batch
        assert rounds.oldest(number) <= int(index.min())
        assert int(index.max()) < rounds.made(number)
        used.update(index.tolist())
    assert all(used[index] == reuse for index in range(rounds.oldest(number)))
    assert max(used.values()) == reuse


def test_a_round_visits_each_trajectory_of_the_bank_once() -> None:
    """8 trajectories, 2 uses: rounds of 4, 8, 8, ..., each with 4 new trajectories."""
    rounds = Rounds(8, 2, 4, 0)
    batches = [rounds.indices(number).tolist() for number in range(5)]
    assert sorted(batches[0]) == [0, 1, 2, 3]
    assert sorted(batches[1] + batches[2]) == list(range(8))
    assert sorted(batches[3] + batches[4]) == list(range(4, 12))
    assert [rounds.made(number) for number in range(5)] == [4, 8, 8, 12, 12]
    assert [rounds.oldest(number) for number in range(5)] == [0, 0, 0, 4, 4]
    assert batches[1] != Rounds(8, 2, 4, 1).indices(1).tolist()


@given(st.integers(2, 30), st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(0, 2), min_size=3, max_size=9))
@settings(deadline=None, max_examples=25)
def test_batches_are_of_one_frame_and_use_all_alike(capacity: int, reuse: int, batch: int, kinds: list[int]) -> None:
    reuse = min(reuse, capacity)
    frame_of = lambda index: kinds[index // 4 % len(kinds)]  # noqa: E731
    rounds = Rounds(capacity, reuse, batch, 0, frame_of=frame_of)
    used: Counter[int] = Counter()
    for number in range(40):
        index = rounds.indices(number).tolist()
        assert len({frame_of(one) for one in index}) == 1
        assert rounds.oldest(number) <= min(index)
        assert max(index) < rounds.made(number)
        used.update(index)
    assert all(used[index] == reuse for index in range(rounds.oldest(number)))
    assert max(used.values()) <= reuse


@pytest.fixture
def content(recipe_content: dict[str, Any]) -> dict[str, Any]:
    """A run of 5 updates of 2 samples, with a bank of 4 trajectories."""
    return {**recipe_content, "trajectories": {"count": 4, "batch": 2, "reuse": 2}}


def solutions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the size of each batch of trajectories that the teacher solves."""
    solved: list[int] = []
    original = Distiller.trajectory

    def counted(self: Distiller, z0: torch.Tensor, *arguments: Any) -> Any:
        solved.append(len(z0))
        return original(self, z0, *arguments)

    monkeypatch.setattr(Distiller, "trajectory", counted)
    return solved


def test_a_run_trains_at_once_and_replaces_the_oldest(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = solutions(monkeypatch)
    distil(parse_recipe(content), tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open()][:-1]  # without the preview's
    # Rounds of 2, 4 and 4 samples: 2 new trajectories before the updates 1, 2 and 4.
    assert [line["trajectories"] for line in log] == [2, 4, 4, 6, 6]
    assert [line["uses"] for line in log] == [1.0, 1.0, 1.5, 1.333, 1.667]
    assert solved == [2, 2, 2]
    assert len(list((tmp_path / "trajectories").glob("*.safetensors"))) == 1  # the next round keeps one of its two


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_a_bank_in_memory_and_on_disk_are_one(content: dict[str, Any], tmp_path: Path, memory: float) -> None:
    distil(parse_recipe(content), tmp_path / "default")
    content["trajectories"]["memory"] = memory
    distil(parse_recipe(content), tmp_path / "other")
    assert_same_file(tmp_path / "other" / "lora.safetensors", tmp_path / "default" / "lora.safetensors")


@pytest.mark.parametrize("left", ["files", "nothing", "a damaged file"])
def test_resuming_anywhere_gives_the_same_lora(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    content |= {"checkpoint": {"every": 1, "keep": 10}, "gradient_accumulation": 2, **ALL_TERMS}
    content["method"] = {**content["method"], "states": {"student": 0.5}}  # type: ignore[dict-item]
    recipe = parse_recipe(content)
    distil(recipe, tmp_path / "whole")
    for kept in (1, 4) if left == "files" else (3,):
        output = tmp_path / f"from-{kept}"
        source = checkpoint.checkpoint_path(tmp_path / "whole", kept)
        shutil.copytree(source, checkpoint.checkpoint_path(output, kept))
        if left != "nothing":
            shutil.copytree(tmp_path / "whole" / "trajectories", output / "trajectories")
        if left == "a damaged file":
            for path in (output / "trajectories").glob("*.safetensors"):
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
        distil(recipe, output, resume=True)
        assert_same_file(output / "lora.safetensors", tmp_path / "whole" / "lora.safetensors")


@pytest.mark.slow
def test_two_processes_have_a_bank_each_and_resume_exactly(
    trainer_forks: Forks, content: dict[str, Any], tmp_path: Path
) -> None:
    """Each process records the files of its own number, and a run from the third checkpoint has the same bits."""
    content |= {"trajectories": {"count": 8, "batch": 2, "reuse": 2}, "checkpoint": {"every": 1, "keep": 10}}
    file, whole, later = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "later"
    file.write_text(yaml.safe_dump(content))
    run_shared(trainer_forks, 2, *DISTIL, file, "--output", whole)
    lines = [json.loads(line) for line in (whole / "log.jsonl").open()][:-1]  # without the preview's
    # Each has 4 at most. Rounds of 2, 4 and 4 samples begin with 2 new trajectories, in each process.
    assert [line["trajectories"] for line in lines] == [4, 8, 8, 12, 12]
    source = checkpoint.checkpoint_path(whole, 3)
    shutil.copytree(source, checkpoint.checkpoint_path(later, 3))
    run_shared(trainer_forks, 2, *DISTIL, file, "--output", later, "--resume")
    assert_same_file(later / "lora.safetensors", whole / "lora.safetensors")


def test_too_few_trajectories_for_all_processes_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(content)
    accelerator = Accelerator(cpu=True)
    parts = assemble(recipe, accelerator)
    rollouts = Rollouts(recipe, parts.teacher, parts.task, parts.examples, parts.distiller, accelerator)
    rollouts.accelerator = SimpleNamespace(num_processes=3, process_index=0)  # type: ignore[assignment]
    with pytest.raises(
        UserError, match=r"count 4 gives each of 3 processes 1, .* used 2 times .*Set count to 6 or more"
    ):
        rollouts.open_bank(tmp_path, "hash")


def test_settings_that_contradict_are_refused_in_words(content: dict[str, Any], tmp_path: Path) -> None:
    for change, message in (
        ({"count": 1, "reuse": 2}, "reuse 2 with count 1: .* at least reuse times batch_size"),
        ({"max_minutes": 1.0}, "max_minutes ends the recording before training, .*leave out max_minutes, or reuse"),
        ({"split": True}, "split divides trajectories .*leave out split, or reuse"),
        ({"reuse": 0.5}, "trajectories.reuse: input should be greater than or equal to 1"),
    ):
        with pytest.raises(UserError, match=message):
            parse_recipe({**content, "trajectories": {**content["trajectories"], **change}})
    distil(parse_recipe(content), tmp_path)
    content["seed"] = 5
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="trajectories of another teacher, data or method"):
        distil(parse_recipe(content), tmp_path)


def test_recipes_without_reuse_keep_their_hash(content: dict[str, Any]) -> None:
    """The digest leaves `reuse` out where it is not set, and `memory`, which changes no result, always."""
    bare = {**content, "trajectories": {"count": 4, "batch": 2}}
    digest = parse_recipe(bare).digest()
    assert parse_recipe({**bare, "trajectories": {**bare["trajectories"], "memory": 3.0}}).digest() == digest
    assert parse_recipe(content).digest() != digest
