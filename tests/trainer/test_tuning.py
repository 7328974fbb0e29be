"""The student's sampler is measured: against a model that is solved exactly, and through the command with its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from flash_diffusion.flash_core.lora import read_lora, write_lora
from flash_diffusion.flash_core.measures.distances import frechet_distance
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import Recipe
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.evaluate.generate import SamplingSetting, sample_latents, sweep_latents, sweep_passes
from flash_diffusion.trainer.evaluate.request import Options
from flash_diffusion.trainer.evaluate.teacher_comparison import TeacherComparison
from flash_diffusion.trainer.evaluate.tuning.choice import choose
from flash_diffusion.trainer.evaluate.tuning.stored import FILE, read_tuned
from flash_diffusion.trainer.evaluate.tuning.sweep import sweep_text_to_image
from flash_diffusion.trainer.evaluate.tuning.tune import in_words

from .paints import COLOURS, Paints
from .stand_ins import random_lora
from .test_evaluate import Eye
from .test_task_evaluation import wide_model

SWEEP = [(steps, share) for steps in (2, 4, 8) for share in (0.0, 0.5, 1.0)]


def test_a_sweep_makes_the_samplers_latents_with_one_shared_first_prediction() -> None:
    model, prompts, seeds = Paints(0.2), ["red", "blue", "green"], [3, 4, 5]
    counted: list[int] = []
    swept = sweep_latents(model, SWEEP, prompts, seeds, counted.append)
    assert sum(counted) == model.passes == sweep_passes(SWEEP) * len(prompts) == 34 * 3
    for (steps, share), latents in zip(SWEEP, swept, strict=True):
        model.stochasticity = {steps: share}
        torch.testing.assert_close(latents, sample_latents(model, SamplingSetting("student", steps), prompts, seeds))


def test_an_exact_student_is_worst_with_all_noise_fresh_and_two_steps_decide_nothing(tmp_path: Path) -> None:
    """The spread of its pictures follows by hand (see ``paints``): 8 steps .235, .228, .174 at 0, .5, 1, the data's .3.

    2 steps give a spread of .083 at every stochasticity, since the first prediction is the mean.
    """
    options = Options(samples=128, steps=32, guidance=1.0, batch_size=64, pictures=2, seeds=2)
    comparison = TeacherComparison(
        Paints(), Eye(), list(COLOURS), options, teacher="paints", features="eye", output=tmp_path, student="s"
    )
    with Progress(disable=True) as progress:
        sets = sweep_text_to_image(comparison, SWEEP, progress)
        assert all(task.completed == task.total for task in progress.tasks)
    floor = frechet_distance(comparison.reference.second.features, comparison.reference.first.features)
    assert [each.floor for each in sets] == [floor, floor]
    assert not torch.equal(*(each.students[8, 1.0] for each in sets))  # each set has its own noise

    def chosen(steps: int, preferred: float) -> Any:
        students = [{share: each.students[steps, share] for share in (0.0, 0.5, 1.0)} for each in sets]
        return choose(steps, students, [each.reference for each in sets], preferred)

    eight = chosen(8, 1.0)
    assert (eight.close, eight.worse) == ((0.0, 0.5), (1.0,))
    assert eight.distances[1.0] > 1.5 * max(eight.distances[share] for share in eight.close)
    assert eight.taken == 0.5  # the nearest to 1 of those that chance can't tell apart
    assert in_words(eight, floor).endswith("Farther from the teacher, beyond chance: 1.")
    assert [chosen(2, preferred).taken for preferred in (0.5, 1.0)] == [0.5, 1.0]


def test_chance_gives_way_to_the_recipes_value_and_a_clear_difference_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 4, generator=generator)
    base = torch.randn(200, 4, generator=generator)
    wobble = 0.02 * torch.randn(200, 4, generator=generator)
    students = {0.0: base + 0.8, 0.3: base + wobble, 0.5: base, 1.0: base - wobble}
    for preferred, taken in ((0.3, 0.3), (0.5, 0.5), (0.9, 1.0), (0.0, 0.3)):
        choice = choose(4, [students], [reference], preferred)
        assert choice.taken == taken
        assert (choice.close, choice.worse) == ((0.3, 0.5, 1.0), (0.0,))
        assert choice.distances[0.5] == pytest.approx(frechet_distance(base, reference))
    other = {share: torch.randn(200, 4, generator=generator) for share in students}
    both = choose(4, [students, other], [reference, reference], 0.5)
    for share, found in both.distances.items():
        own = [frechet_distance(made[share], reference) for made in (students, other)]
        assert found == pytest.approx(sum(own) / 2)
    # One set tells .3 from .5; the mean with a second set, in which chance moves both far, does not.
    offset = {0.5: base, 0.3: base + torch.tensor([0.3, 0.0, 0.0, 0.0])}
    assert choose(4, [offset], [reference], 0.3).close == (0.5,)
    chance = torch.Generator().manual_seed(0)
    wide = {share: 1.5 * torch.randn(200, 4, generator=chance) for share in offset}
    other = torch.randn(400, 4, generator=chance)
    sets = choose(4, [offset, wide], [reference, other], 0.3)
    assert sets.close == (0.5, 0.3)
    line = in_words(choice, None)
    assert "Farther from the teacher, beyond chance: 0." in line


def test_a_run_is_measured_written_and_exported(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    lora = distil(recipe, run)
    tensors, before = load_file(lora), read_lora(lora).metadata
    assert before is not None
    command = ["evaluate", "--run", run, "--tune-sampler", "0", "0.5", "--samples", "4", "--steps", "1"]
    command += ["--guidance", "1", "--device", "cpu", "--pictures", "2", "--output", tmp_path / "out"]
    assert main([*map(str, command)]) == 0
    assert "Nothing was changed. Add --write" in capsys.readouterr().out
    assert read_lora(lora).metadata == before
    assert read_tuned(run) is None
    assert main([*map(str, command), "--seeds", "2", "--write"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("distance to the teacher / floor", "2 steps: ", "8 steps: ", "4 pictures are too few", "export"):
        assert part in said
    tuned = read_tuned(run)
    assert tuned is not None
    assert json.loads((tmp_path / "out" / "tuning.json").read_text()) == json.loads((run / FILE).read_text())
    assert set(tuned.stochasticity) == {2, 4, 8}
    assert set(tuned.stochasticity.values()) <= {0.0, 0.5}
    assert tuned.updates == "5"
    assert read_lora(lora).metadata == replace(before, stochasticity=tuned.stochasticity)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(lora).items())

    lora.unlink()
    assert main(["export", str(run)]) == 0
    after = read_lora(lora).metadata
    assert after is not None
    assert after.stochasticity == tuned.stochasticity
    card = " ".join((run / "README.md").read_text().split())
    assert "Flash Sampler's `auto` takes it" in card
    assert f"Measured on 2 sets of 4 pictures in the features of {tuned.features}" in card
    assert main(["export", str(run), "--checkpoint", "4"]) == 0
    assert "measured at update 5, and this LoRA is of update 4" in caplog.text
    (run / FILE).write_text('{"stochasticity": {"4": 2}}')
    with pytest.raises(UserError, match=r"sampler\.json can't be read"):
        read_tuned(run)


def test_a_task_is_measured_by_its_own_pictures(
    tiny_model: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wide_model(tmp_path / "model", 9)
    file = read_lora(random_lora(tiny_model, tmp_path / "text.safetensors"))
    assert file.metadata is not None
    student = tmp_path / "student.safetensors"
    metadata = replace(file.metadata, task="inpainting", teacher_hash="", stochasticity={4: 0.5})
    write_lora(student, file.modules, metadata)
    command = ["evaluate", "--task", "inpainting", "--family", "sd15", "--teacher", model, "--lora", student]
    command += ["--data", pictures, "--samples", "5", "--batch-size", "3", "--steps", "1", "--guidance", "1"]
    command += ["--tune-sampler", "0.5", "1", "--output", tmp_path / "out"]

    def tuned(*options: object) -> dict[str, Any]:
        assert main([*map(str, (*command, *options))]) == 0
        found: dict[str, Any] = json.loads((tmp_path / "out" / "tuning.json").read_text())
        return found

    alone, result = [tuned("--seed", seed) for seed in (0, 1)], tuned("--seeds", 2, "--write")
    assert [result[name] for name in ("task", "samples", "seeds", "floor")] == ["inpainting", 5, 2, None]
    for steps in "248":
        for share in ("0.5", "1.0"):
            mean = sum(each["distances"][steps][share] for each in alone) / 2
            assert result["distances"][steps][share] == pytest.approx(mean, rel=1e-4)
    written = read_lora(student).metadata
    assert written is not None
    assert {str(steps): share for steps, share in written.stochasticity.items()} == result["stochasticity"]
    said = " ".join(capsys.readouterr().out.split())
    assert "Fréchet distance to the teacher, means over 2 sets, by steps and stochasticity" in said
    # A file of the teacher's answers is made, and used; too few samples for distances of sets give no floor.
    reference = tmp_path / "answers.safetensors"
    made, again = (tuned("--reference", reference) for _ in range(2))
    assert made == again
    assert made["distances"] == alone[0]["distances"]
    assert made["floor"] is None
    monkeypatch.setattr("flash_diffusion.trainer.evaluate.task_comparison.samples_needed", lambda features: 4)
    reference.unlink()
    (tmp_path / "answers.seed1.safetensors").unlink(missing_ok=True)
    made, again = (tuned("--reference", reference, "--seeds", 2) for _ in range(2))
    assert made == again
    assert made["distances"] == result["distances"]
    assert made["floor"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tune-sampler",), "needs a student"),
        (("--lora", "LORA", "--write"), "--write writes the result of --tune-sampler"),
        (("--lora", "LORA", "--tune-sampler", "0.5"), "at least two different numbers from 0 to 1, got 0.5"),
        (("--lora", "LORA", "--tune-sampler", "0", "1.5"), "at least two different numbers from 0 to 1, got 0 1.5"),
        (("--lora", "LORA", "--tune-sampler", "--stochasticity", "1"), "leave --stochasticity out"),
        (("--lora", "LORA", "--tune-sampler", "--make-reference"), "leave --make-reference out"),
        (("--lora", "PLAIN", "--tune-sampler", "--write"), "has no Flash metadata that could hold the result"),
    ],
)
def test_options_that_do_not_fit_are_named(
    options: tuple[str, ...], words: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"LORA": tmp_path / "lora.safetensors", "PLAIN": tmp_path / "plain.safetensors"}
    modules = read_lora(random_lora(tiny_model, files["LORA"])).modules
    write_lora(files["PLAIN"], modules, None)
    given = [str(files.get(option, option)) for option in options]
    assert main(["evaluate", "--output", str(tmp_path / "out"), *given]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
