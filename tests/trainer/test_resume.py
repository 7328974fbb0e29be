"""A killed run continues exactly: its LoRA has the bits of an uninterrupted run's."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flash_diffusion.flash_core.lora import read_lora
from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill import checkpoint
from flash_diffusion.trainer.distill.export_command import export_checkpoint
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.distill.training_log import TrainingLog
from flash_diffusion.trainer.errors import UserError

from .models import tiny_recipe, tiny_stable_diffusion


def assert_same_file(one: Path, other: Path) -> None:
    """Two LoRAs are the same: every bit of every tensor, and the header."""
    ours, theirs = load_file(one), load_file(other)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        assert first.metadata() == second.metadata()


def logged(run: Path, after: int = 0) -> list[dict[str, Any]]:
    """Return the lines of a run's log that come after an update, without what the clock decides."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "images_per_second")
    return [
        {name: value for name, value in line.items() if name not in clock} for line in lines if line["update"] > after
    ]


# Every option that keeps something from one update to the next, or draws random numbers.
ALL_TERMS = {
    "method": {
        "teacher_steps": 4,
        "guidance": [1.5, 3.0],
        "states": {"trajectory": 0.3, "student": 0.5},
        "distillation_weighting": "velocity",
        "adversarial": "relativistic",
        "adversarial_timesteps": "10..250",
        "adversarial_rows": "first_step",
        "adversarial_weighting": "gradient_norm",
        "r1": 0.1,
        "discriminator": {"updates": 2, "warmup": 1, "latents": True},
        "fake_score": "critic",
        "dmd": {"form": "decoupled", "rows": "first_step"},
        "critic": {"updates": 2, "warmup": 2, "memory": 5, "ida": 0.03},
    },
    "sampler": {"stochasticity": 0.5},
    "phases": [
        {"name": "warm-up", "updates": 2, "modes": [0, 0, 0.5, 0.5]},
        {
            "name": "all",
            "updates": 3,
            "modes": [0.4, 0.2, 0.2, 0.2],
            "adversarial": 0.3,
            "dmd": 0.7,
            "feature_matching": 0.1,
            "intra_segment": 0.2,
            "first_step_distillation": 0.2,
        },
    ],
}


@pytest.mark.parametrize(
    ("changes", "positions"), [({}, (1, 2, 3, 4)), (ALL_TERMS, (2, 4))], ids=["paper", "all terms"]
)
def test_resuming_at_any_checkpoint_gives_the_same_lora(
    recipe_content: dict[str, Any], tmp_path: Path, changes: dict[str, Any], positions: tuple[int, ...]
) -> None:
    """Without a kill, but from every single position; with all terms before and after their warm-up."""
    recipe_content |= {"checkpoint": {"every": 1, "keep": 10}, "log_every": 2, **changes}
    recipe = parse_recipe(recipe_content)
    distil(recipe, tmp_path / "whole")
    for kept in positions:
        output = tmp_path / f"from-{kept}"
        source = checkpoint.checkpoint_path(tmp_path / "whole", kept)
        shutil.copytree(source, checkpoint.checkpoint_path(output, kept))
        distil(recipe, output, resume=True)
        assert_same_file(output / "lora.safetensors", tmp_path / "whole" / "lora.safetensors")
        assert logged(output) == logged(tmp_path / "whole", after=kept)


def test_a_half_written_checkpoint_is_ignored(recipe: Recipe, tmp_path: Path) -> None:
    distil(recipe, tmp_path)
    partial = tmp_path / "checkpoints" / ".00000009.partial"
    partial.mkdir()
    (partial / checkpoint.TENSORS).write_bytes(b"half")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["00000004", "00000005"]


def test_a_checkpoint_of_other_shapes_is_refused(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    distil(parse_recipe(recipe_content), tmp_path)
    recipe_content["lora"]["targets"] = ["to_q"]
    with pytest.raises(UserError, match="does not fit this recipe"):
        distil(parse_recipe(recipe_content), tmp_path, resume=True)
    recipe_content["lora"] = {"rank": 2, "alpha": 8}
    with pytest.raises(UserError, match="does not fit this recipe"):
        distil(parse_recipe(recipe_content), tmp_path, resume=True)


def damage_by(kind: str, file: Path) -> None:
    """Damage a file in one of the ways of a failing disk."""
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "a changed byte":
        content[random.Random(0).randrange(len(content))] ^= 0x10
        file.write_bytes(content)
    else:
        file.write_bytes(content[: {"empty": 0, "cut": len(content) // 2}[kind]])


@pytest.fixture(scope="module")
def whole_run(tiny_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of five updates with the checkpoints 4 and 5."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    distil(parse_recipe(tiny_recipe(tiny_model, pictures)), folder)
    return folder


def copy_of(run: Path, folder: Path) -> Path:
    """Copy a run without its LoRA."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("lora.safetensors"))
    return folder


FILES = ("state.safetensors", "state.json", "random-0.safetensors", "checksums.sha256")


@pytest.mark.parametrize("file", FILES)
def test_any_damage_of_a_checkpoint_is_found(whole_run: Path, tmp_path: Path, file: str) -> None:
    """Every byte of the small files, and some of the large one."""
    folder = tmp_path / "00000005"
    shutil.copytree(checkpoint.checkpoint_path(whole_run, 5), folder)
    assert checkpoint.damage(folder) == ""
    content = (folder / file).read_bytes()
    for position in range(0, len(content), 1 if len(content) < 3000 else len(content) // 40):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (folder / file).write_bytes(changed)
        assert checkpoint.damage(folder), position
    for kind in ("missing", "empty", "cut"):
        (folder / file).write_bytes(content)
        damage_by(kind, folder / file)
        assert file in checkpoint.damage(folder), kind
    (folder / file).write_bytes(content)
    assert checkpoint.damage(folder) == ""


@pytest.mark.parametrize(("file", "kind"), [*zip(FILES, ("a changed byte", "empty", "cut", "missing"), strict=True)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    recipe: Recipe, whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, kind: str
) -> None:
    run = copy_of(whole_run, tmp_path / "run")
    damage_by(kind, checkpoint.checkpoint_path(run, 5) / file)
    lora = export_checkpoint(run)
    assert read_lora(lora).metadata.training["updates"] == "4"
    assert f"{checkpoint.checkpoint_path(run, 5)}: {file}" in caplog.text
    with pytest.raises(UserError, match=rf"00000005 is damaged: {file}.*updates 4, 5"):
        export_checkpoint(run, 5)
    caplog.clear()
    distil(recipe, run, resume=True)
    assert f"{checkpoint.checkpoint_path(run, 5)}: {file}" in caplog.text
    assert_same_file(run / "lora.safetensors", whole_run / "lora.safetensors")
    assert [path.name for path in checkpoint.checkpoints(run)] == ["00000004", "00000005"]
    assert (run / "checkpoints" / "damaged-00000005").is_dir()


def test_damage_of_all_checkpoints_is_one_error(recipe: Recipe, whole_run: Path, tmp_path: Path) -> None:
    run = copy_of(whole_run, tmp_path / "run")
    for folder in checkpoint.checkpoints(run):
        damage_by("empty", folder / checkpoint.FACTS)
    for resume in (lambda: distil(recipe, run, resume=True), lambda: export_checkpoint(run)):
        with pytest.raises(
            UserError, match=r"no checkpoint .* is intact .*00000005: state.json .*00000004: state.json"
        ):
            resume()
    assert len(checkpoint.checkpoints(run)) == 2


def test_resuming_in_an_empty_folder_begins_a_run(recipe: Recipe, tmp_path: Path) -> None:
    assert distil(recipe, tmp_path / "new", resume=True).is_file()


def test_another_teacher_is_refused_and_other_data_are_said(
    recipe_content: dict[str, Any], whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(whole_run, tmp_path / "run")
    shutil.rmtree(checkpoint.checkpoint_path(run, 5))
    before = (run / "config.yaml").read_bytes()
    other = {**recipe_content, "model": {"family": "sd15", "path": str(tiny_stable_diffusion(tmp_path / "b", seed=1))}}
    with pytest.raises(UserError, match=rf"{run} holds 4 updates with another teacher .*{tmp_path / 'b'}.*config.yaml"):
        distil(parse_recipe(other), run, resume=True)
    assert (run / "config.yaml").read_bytes() == before
    pictures = shutil.copytree(recipe_content["data"]["path"], tmp_path / "pictures")
    moved = parse_recipe({**recipe_content, "data": {"source": "folder", "path": str(pictures)}})
    distil(moved, copy_of(run, tmp_path / "moved"), resume=True)
    assert "the data have changed" not in caplog.text
    (pictures / "000.txt").write_text("another caption")
    distil(moved, run, resume=True)
    assert "the data have changed since update 4" in caplog.text


@pytest.mark.parametrize("limit", [40, 400, 3000, 30_000, 300_000])
def test_a_full_disk_is_an_error_that_leaves_the_run_usable(
    recipe: Recipe, whole_run: Path, tmp_path: Path, limit: int
) -> None:
    """The system refuses to write more than ``limit`` bytes into any file, as it refuses on a full disk."""
    resource = pytest.importorskip("resource")
    run = copy_of(whole_run, tmp_path / "run")
    shutil.rmtree(checkpoint.checkpoint_path(run, 5))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError) as error:
            distil(recipe, run, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    path = re.fullmatch(r"(.*) could not be written: File too large \(.* GB free on that disk\)\. .*", str(error.value))
    assert path, error.value
    assert Path(path[1]).is_relative_to(run)
    assert not checkpoint.damage(checkpoint.checkpoint_path(run, 4))
    assert not list(run.rglob(".*.partial"))
    distil(recipe, run, resume=True)
    assert_same_file(run / "lora.safetensors", whole_run / "lora.safetensors")


def test_every_update_is_once_in_the_log_and_in_tensorboard(tmp_path: Path) -> None:
    """A session logs five updates and is killed; the next one goes on from a checkpoint after the third."""
    for first, updates in ((0, range(1, 6)), (3, range(4, 7))):
        log = TrainingLog(tmp_path, first, active=True)
        for update in updates:
            log.record({"update": update}, {"total": update + first / 10}, {})
        log.flush()
        # TensorBoard reads the files of a folder in the order of their names, which begin with the second.
        (newest,) = (tmp_path / "tensorboard").glob("events.out.tfevents.[1-9]*")
        newest.rename(newest.with_name(f"events.out.tfevents.{first:010d}"))
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("total")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    wanted = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.3), (5, 5.3), (6, 6.3)]
    assert [(point.step, round(point.value, 5)) for point in curves] == wanted
    assert [(line["update"], line["total"]) for line in lines] == wanted
