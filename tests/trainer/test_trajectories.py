"""Recorded trajectories: whose they are is checked before anything is recorded; only missing ones are recorded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.trainer.config import ModelSection, Recipe, TaskSection, parse_recipe
from flash_diffusion.trainer.data.batches.rollouts import Rollouts, phase_ranges
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.interrupts import StopRequest
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from .models import picture_folder, tiny_recipe


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    return load_teacher(ModelSection(family="sd15", path=str(tiny_model)))


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Recipe:
    content = tiny_recipe(tiny_model, picture_folder(tmp_path / "pictures"))
    return parse_recipe({**content, "trajectories": {"count": 6, "batch": 4}})


Record = Callable[..., tuple[Rollouts, list[int]]]


@pytest.fixture
def record(teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Record as a run does; return the rollouts and the sizes of the batches that the teacher solved."""

    def record(recipe: Recipe, minutes: float | None = None, output: str = "run") -> tuple[Rollouts, list[int]]:
        solved: list[int] = []
        original = Distiller.trajectory

        def counted(self: Distiller, z0: torch.Tensor, *arguments: Any) -> Any:
            solved.append(len(z0))
            return original(self, z0, *arguments)

        task = build_task(TaskSection())
        examples = prepare_examples(recipe.data, teacher, task)
        distiller = Distiller(teacher.denoiser, recipe.method.settings())
        rollouts = Rollouts(recipe, teacher, task, examples, distiller, Accelerator(cpu=True))
        with monkeypatch.context() as patch:
            patch.setattr(Distiller, "trajectory", counted)
            rollouts.record(tmp_path / output, teacher.weights_hash(), minutes, lambda *_: None, StopRequest())
        return rollouts, solved

    return record


def recorded(rollouts: Rollouts) -> list[dict[str, torch.Tensor]]:
    assert rollouts.bank is not None
    return rollouts.bank.store.rows(rollouts.bank.places)


def assert_equal(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def _caption(folder: Path) -> None:
    (folder / "003.txt").write_text("another caption")


def _picture(folder: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "003.png")


def _fewer(folder: Path) -> None:
    for ending in ("png", "txt"):
        (folder / f"005.{ending}").unlink()


def _swapped(folder: Path) -> None:
    """The same pictures and captions, paired differently."""
    one, two = folder / "000.txt", folder / "001.txt"
    texts = one.read_text(), two.read_text()
    one.write_text(texts[1])
    two.write_text(texts[0])


def test_split_trajectories_belong_to_one_phase_each(recipe: Recipe, record: Record) -> None:
    phase = recipe.phases[0].model_dump()
    split = {"trajectories": {"count": 6, "batch": 4, "split": True}, "batch_size": 1}
    phases = [{**phase, "name": "one", "updates": 4}, {**phase, "name": "two", "updates": 2}]
    rollouts, _ = record(parse_recipe({**recipe.model_dump(mode="json"), **split, "phases": phases}))
    wanted = torch.stack([row["z_teacher"] for row in recorded(rollouts)])
    for section, own in zip(rollouts.recipe.phases, (wanted[:4], wanted[4:]), strict=True):
        shown = [rollouts.batch(position, section).z_teacher[0] for position in range(len(own))]
        assert sorted(z.flatten().tolist() for z in shown) == sorted(z.flatten().tolist() for z in own)
    with pytest.raises(UserError, match=r"6 trajectories leave none for a phase of 1 of 100 updates"):
        phase_ranges(6, [99, 1])


@pytest.mark.parametrize("change", [_caption, _picture, _fewer, _swapped])
def test_other_data_under_the_same_path_are_refused_before_anything_is_recorded(
    recipe: Recipe, record: Record, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    assert recipe.data.path is not None
    record(recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    change(recipe.data.path)
    with pytest.raises(UserError, match="trajectories of another teacher, data or method .*remove the folder"):
        record(recipe.model_copy(update={"trajectories": recipe.trajectories.model_copy(update={"count": 12})}))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("damage", ["removed", "first byte", "a value", "cut short"])
def test_a_damaged_file_is_recorded_again_bit_for_bit(
    recipe: Recipe, record: Record, tmp_path: Path, damage: str
) -> None:
    first, solved = record(recipe)
    assert sorted(solved) == [2, 4]
    wanted = recorded(first)
    path = max((tmp_path / "run").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "cut short":
        os.truncate(path, len(content) // 2)
    else:
        place = {"first byte": 0, "a value": len(content) // 2}[damage]
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    if damage == "a value":  # the header is sound, so the damage is found as soon as the row is read
        again, solved = record(recipe)
        assert solved == []
        with pytest.raises(UserError, match=rf"{path} .* is damaged .* removed now"):
            recorded(again)
    again, solved = record(recipe)
    assert solved == [4]
    assert path.read_bytes() == content
    assert_equal(recorded(again), wanted)


def test_raising_the_count_records_what_is_missing(recipe: Recipe, record: Record) -> None:
    """Whole batches stay; a run that asked for all of them at once has the same bits."""

    def counting(count: int) -> Recipe:
        section = recipe.trajectories.model_copy(update={"count": count})
        return recipe.model_copy(update={"trajectories": section})

    record(recipe)
    raised, solved = record(counting(12))
    assert sorted(solved) == [4, 4]  # the batch of 2 was cut off by the count
    at_once, _ = record(counting(12), output="at once")
    assert_equal(recorded(raised), recorded(at_once))
    assert record(counting(12))[1] == []
    assert record(recipe)[1] == []  # lowered again: all are there


def test_an_early_end_stays_until_the_count_changes(recipe: Recipe, record: Record) -> None:
    ended, solved = record(recipe, minutes=0.0)
    assert solved == [4]
    assert len(recorded(ended)) == 4
    again, solved = record(recipe)
    assert solved == []
    assert len(recorded(again)) == 4
    raised = recipe.trajectories.model_copy(update={"count": 8})
    assert sum(record(recipe.model_copy(update={"trajectories": raised}))[1]) == 4


def test_each_trajectory_keeps_its_picture_and_caption(recipe: Recipe, record: Record, teacher: Teacher) -> None:
    rollouts, _ = record(recipe)
    assert rollouts.bank is not None
    batch = rollouts.bank.batch(torch.arange(6), rollouts.examples, lambda part: part, "cpu")  # type: ignore[arg-type]
    samples = torch.cat([row["sample"] for row in recorded(rollouts)])
    assert sorted(samples.tolist()) == list(range(6))
    z0, conditioning = rollouts.examples.batch(samples, "cpu")  # type: ignore[union-attr]
    assert torch.equal(batch.z0, z0)
    for field in dataclasses.fields(conditioning):
        wanted, found = (getattr(part, field.name) for part in (conditioning, batch.conditioning))
        assert (wanted is None and found is None) or field.name == "residuals" or torch.equal(wanted, found)
