"""Whole runs on a tiny model: trained and frozen weights, phases, clock, divergence, folders."""

from __future__ import annotations

import json
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.flash_core.runs.schedule import WeightAverage
from flash_diffusion.trainer.config import OptimizerSection, Recipe, parse_recipe
from flash_diffusion.trainer.distill import checkpoint, schedule
from flash_diffusion.trainer.distill.assembly import assemble
from flash_diffusion.trainer.distill.loop import Run, TrainingDiverged, distil
from flash_diffusion.trainer.distill.schedule import learning_rate_factor, phase_at
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.health.figures import is_preview
from flash_diffusion.trainer.seeds import stream
from flash_diffusion.trainer.teachers.denoiser import DiffusersDenoiser


def log(output: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log that tell of updates."""
    return [line for line in whole_log(output) if not is_preview(line)]


def whole_log(output: Path) -> list[dict[str, Any]]:
    """Return all lines of a run's log."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def frozen(denoiser: DiffusersDenoiser) -> dict[str, torch.Tensor]:
    """Return a copy of the weights that must not change."""
    return {name: value.detach().clone() for name, value in denoiser.network.named_parameters() if ".lora_" not in name}


def test_only_the_adapters_and_heads_change(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    recipe_content["method"]["fake_score"] = "critic"
    recipe = parse_recipe(recipe_content)
    run = Run(recipe, tmp_path, Accelerator(), None)
    before = frozen(run.parts.teacher.denoiser)
    trained = {
        part: {name: value.detach().clone() for name, value in parameters.items()}
        for part, parameters in run.parts.trained.parameters.items()
    }
    run.train()
    after = frozen(run.parts.teacher.denoiser)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert set(trained) == {"student", "discriminator", "critic"}
    for part, parameters in run.parts.trained.parameters.items():
        assert any(not torch.equal(value, trained[part][name]) for name, value in parameters.items()), part


def test_run_writes_all_its_files(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the computer's clock goes back an hour whenever it is read."""
    output, hours = tmp_path / "run", count(400_000, -1)
    monkeypatch.setattr("time.time", lambda: next(hours) * 3600.0)
    lora = distil(recipe, output)
    assert lora == output / "lora.safetensors"
    assert {path.name for path in output.iterdir()} >= {
        "lora.safetensors", "README.md", "config.yaml", "log.jsonl", "previews", "tensorboard", "checkpoints",
    }  # fmt: skip
    progress = json.loads((output / "progress.json").read_text(encoding="utf-8"))
    assert progress["share"] == 1
    assert progress["left"] == 0
    assert progress["note"].startswith("5 updates")
    *lines, last = whole_log(output)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert (last["update"], last["phase"]) == (5, "all")
    assert {"picture_contrast", "picture_luminance"} <= set(last)
    assert [line["phase"] for line in lines] == ["warm-up", "warm-up", "all", "all", "all"]
    assert "adversarial" not in lines[0]
    assert {"distillation", "adversarial", "dmd", "discriminator", "gradient_student"} <= set(lines[-1])
    assert all(line["images_per_second"] > 0 for line in lines)
    assert 0 <= lines[0]["seconds"] <= lines[-1]["seconds"] < 3600
    (preview,) = (output / "previews").iterdir()
    with Image.open(preview) as grid:
        assert grid.width > 64 * 2
    assert [path.name for path in checkpoint.checkpoints(output)] == ["00000004", "00000005"]
    assert "red" not in (output / "log.jsonl").read_text()


def test_checkpoint_holds_only_trained_parts(recipe: Recipe, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path, Accelerator(), None)
    run.train()
    parts = run.parts.trained
    student = sum(value.numel() for value in parts.parameters["student"].values())
    heads = sum(value.numel() for value in parts.parameters["discriminator"].values())
    # Itself and two moments each, and the student's average: four bytes a number, and the names.
    size = (checkpoint.checkpoints(tmp_path)[-1] / checkpoint.TENSORS).stat().st_size
    assert size < 4 * (4 * student + 3 * heads) + 200_000
    names = load_file(checkpoint.checkpoints(tmp_path)[-1] / checkpoint.TENSORS)
    assert {name.split("/")[0] for name in names} == {"student", "discriminator", "average", "optimizer"}
    assert all(".lora_" in name for name in names if name.startswith(("student/", "average/")))
    files = checkpoint.checkpoints(tmp_path)[-1].iterdir()
    assert {path.suffix for path in files} == {".safetensors", ".json", ".sha256"}


def test_the_student_learns(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    """On two recorded trajectories the distillation loss falls well below its start."""
    recipe_content |= {
        "phases": [{"name": "fit", "updates": 60, "modes": [1, 0, 0, 0]}],
        "optimizer": {"lr": 3e-3},
        "trajectories": {"count": 2, "batch": 2},
        "checkpoint": {"every": 0},
        "log_every": 10,
    }
    distil(parse_recipe(recipe_content), tmp_path / "run")
    losses = [line["distillation"] for line in log(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("terms", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["distillation", "adversarial", "dmd"])
def test_gradient_checkpointing_changes_no_gradient(recipe_content: dict[str, Any], terms: tuple[float, ...]) -> None:
    """With the real UNet, whose blocks are recomputed while roles have moved on."""
    distillation, adversarial, dmd = terms
    recipe_content["phases"] = [
        {
            "name": "one", "updates": 1, "modes": [1, 1, 1, 1],
            "distillation": distillation, "adversarial": adversarial, "dmd": dmd,
        }
    ]  # fmt: skip
    recipe_content["method"]["fake_score"] = "critic"
    gradients = []
    for recompute in (False, True):
        recipe = parse_recipe({**recipe_content, "gradient_checkpointing": recompute})
        parts = assemble(recipe, Accelerator())
        assert parts.teacher.denoiser.network.is_gradient_checkpointing is recompute
        generator = stream(0, "noise")
        student = parts.trained.parameters["student"]
        with torch.no_grad():
            for value in student.values():
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
        z0, conditioning = parts.examples.batch(torch.tensor([0, 3]), "cpu")
        phase = recipe.phases[0].phase()
        rollout = parts.distiller.rollout(z0, conditioning, parts.teacher.unconditional(2), phase, generator)
        parts.distiller.student_step(rollout, phase, generator)
        gradients.append([value.grad for value in student.values()])
    assert all(gradient is not None for gradient in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)


def test_accumulated_batches_equal_one_larger_batch(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    """Two batches of two give the gradient of one batch of four."""
    recipe_content["phases"] = [{"name": "one", "updates": 1, "modes": [1, 0, 0, 0]}]
    recipe_content |= {"trajectories": {"count": 4, "batch": 4}, "gradient_clip": 1e9, "optimizer": {"lr": 1e-3}}
    norms = []
    for name, size, accumulated in (("whole", 4, 1), ("parts", 2, 2)):
        recipe = parse_recipe({**recipe_content, "batch_size": size, "gradient_accumulation": accumulated})
        distil(recipe, tmp_path / name)
        norms.append(log(tmp_path / name)[0]["gradient_student"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_only_missing_trajectories_are_recorded_again(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_content |= {"trajectories": {"count": 5, "batch": 2}}
    recipe = parse_recipe(recipe_content)
    distil(recipe, tmp_path)
    assert len(list((tmp_path / "trajectories").glob("*.safetensors"))) == 3
    for path in checkpoint.checkpoints(tmp_path):
        assert not list(path.glob("*traject*"))
    removed = max((tmp_path / "trajectories").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = removed.read_bytes()
    removed.unlink()
    solved: list[int] = []
    original = Distiller.trajectory

    def counted(self: Distiller, z0: torch.Tensor, *arguments: Any) -> Any:
        solved.append(len(z0))
        return original(self, z0, *arguments)

    monkeypatch.setattr(Distiller, "trajectory", counted)
    distil(recipe, tmp_path, resume=True)
    assert solved == [2]
    assert removed.read_bytes() == content


def test_trajectories_have_the_same_bits_from_one_thread_and_from_two(
    recipe_content: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    recipe_content |= {"trajectories": {"count": 5, "batch": 2}}
    recorded = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        output = tmp_path / str(threads)
        distil(parse_recipe(recipe_content), output)
        recorded.append([path.read_bytes() for path in sorted((output / "trajectories").glob("*.safetensors"))])
        assert torch.get_num_threads() == threads
    assert recorded[0] == recorded[1]
    assert len(recorded[0]) == 3


def test_trajectories_of_another_recipe_are_refused(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    recipe_content |= {"trajectories": {"count": 2, "batch": 2}}
    distil(parse_recipe(recipe_content), tmp_path)
    recipe_content["method"]["guidance"] = [2, 2]
    with pytest.raises(Exception, match="trajectories of another teacher, data or method"):
        distil(parse_recipe(recipe_content), tmp_path, resume=True)


def test_time_limit_ends_the_run_and_the_schedule(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of this test moves on by a tenth of a second whenever it is read."""
    ticks = count()
    monkeypatch.setattr(schedule, "now", lambda: 0.1 * next(ticks))
    recipe_content["phases"][0]["updates"] = recipe_content["phases"][1]["updates"] = 100_000
    recipe_content |= {
        "limits": {"max_minutes": 0.15}, "optimizer": {"lr": 1e-3, "schedule": "cosine"}, "checkpoint": {"every": 0},
    }  # fmt: skip
    distil(parse_recipe(recipe_content), tmp_path)
    lines = log(tmp_path)
    assert 8.5 < lines[-1]["seconds"] <= 9
    assert {line["phase"] for line in lines} == {"warm-up", "all"}
    assert lines[-1]["lr"] < 0.05 * lines[0]["lr"]


def test_divergence_stops_the_run_and_names_the_last_good_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(recipe, tmp_path, Accelerator(), None)
    original = Distiller.student_step

    def poisoned(self: Distiller, *arguments: Any) -> Any:
        step = original(self, *arguments)
        if run.state.update == 3:
            step.terms["total"] *= float("nan")
        return step

    monkeypatch.setattr(Distiller, "student_step", poisoned)
    with pytest.raises(TrainingDiverged, match="not a finite number") as error:
        run.train()
    assert str(checkpoint.checkpoint_path(tmp_path, 2)) in str(error.value)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["00000002"]
    assert not (tmp_path / "lora.safetensors").exists()


def test_infinite_gradient_stops_the_run(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(parse_recipe({**recipe_content, "log_every": 100}), tmp_path, Accelerator(), None)
    original = Distiller.student_step

    def poisoned(self: Distiller, *arguments: Any) -> Any:
        step = original(self, *arguments)
        next(iter(run.parts.trained.parameters["student"].values())).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return step

    monkeypatch.setattr(Distiller, "student_step", poisoned)
    with pytest.raises(TrainingDiverged, match="no checkpoint yet"):
        run.train()


def test_folder_with_a_run_is_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    distil(recipe, tmp_path)
    with pytest.raises(Exception, match="--resume"):
        distil(recipe, tmp_path)


def test_missing_data_is_found_before_the_model_is_loaded(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    recipe_content["data"]["path"] = str(tmp_path / "nowhere")
    recipe_content["model"]["path"] = "/no/model/either"
    with pytest.raises(Exception, match="no folder .*nowhere"):
        distil(parse_recipe(recipe_content), tmp_path / "run")


def test_phases_follow_each_other_by_updates(recipe: Recipe) -> None:
    names = [phase_at(recipe, update / recipe.updates).name for update in range(recipe.updates)]
    assert names == ["warm-up"] * 2 + ["all"] * 3


def test_every_update_has_the_phase_that_the_recipe_says(recipe_content: dict[str, Any]) -> None:
    """Also where update / updates is not an exact number."""
    recipe_content["phases"] = [
        {"name": str(index), "updates": count, "modes": [1, 1, 1, 1]} for index, count in enumerate((3, 7, 1, 46))
    ]
    recipe = parse_recipe(recipe_content)
    wanted = [str(index) for index, phase in enumerate(recipe.phases) for _ in range(phase.updates)]
    assert [phase_at(recipe, update / recipe.updates).name for update in range(recipe.updates)] == wanted


def test_learning_rates_by_hand() -> None:
    cosine = OptimizerSection(schedule="cosine", warmup=10, decay_from=0.5)
    assert learning_rate_factor(cosine, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate_factor(cosine, 50, 0.4) == 1
    assert learning_rate_factor(cosine, 75, 0.75) == pytest.approx(0.5)
    assert learning_rate_factor(cosine, 100, 1.0) == pytest.approx(0, abs=1e-12)
    assert learning_rate_factor(OptimizerSection(), 0, 0.9) == 1


def test_average_follows_its_formula() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = WeightAverage({"x": parameter}, 0.9)
    wanted = 1.0
    for update in range(30):
        with torch.no_grad():
            parameter.add_(1)
        average.update(update)
        decay = min(0.9, (1 + update) / (10 + update))
        wanted = decay * wanted + (1 - decay) * parameter.item()
    assert float(average.tensors["x"]) == pytest.approx(wanted, rel=1e-5)
    live = parameter.item()
    with average.applied():
        assert parameter.item() == pytest.approx(wanted, rel=1e-5)
    assert parameter.item() == live


def test_time_limit_without_an_update_is_an_error(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    """Recording 5,000 trajectories would take ten minutes, and the limit is 6 ms; one batch is still recorded."""
    recipe_content |= {"trajectories": {"count": 5000, "batch": 2}, "limits": {"max_minutes": 0.0001}}
    with pytest.raises(UserError, match=r"limits\.max_minutes: 0\.0001 minutes were over before the first update"):
        distil(parse_recipe(recipe_content), tmp_path / "run")
    assert len(list((tmp_path / "run" / "trajectories").glob("*.safetensors"))) == 1
    assert not (tmp_path / "run" / "lora.safetensors").exists()
