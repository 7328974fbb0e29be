"""A run's health: its figures against values worked by hand, its rules on made-up logs, a sick run and a sound one."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_diffusion.trainer.config import Recipe, parse_recipe
from flash_diffusion.trainer.distill.export_command import export_checkpoint
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.health.advice import advice
from flash_diffusion.trainer.health.figures import health_figures, is_preview
from flash_diffusion.trainer.health.lines import read_lines
from flash_diffusion.trainer.health.monitor import HealthMonitor
from flash_diffusion.trainer.health.rules import RULES
from flash_diffusion.trainer.metrics.pictures.drift import diversity, drift
from flash_diffusion.trainer.report.build import health_findings

# -- figures ---------------------------------------------------------------------------------------------------------


def test_a_line_of_the_log_has_ratios_in_place_of_sums() -> None:
    figures = health_figures(
        {
            "total": 3.0,
            "student_error": 0.6,
            "student_contrast": 0.9,
            "teacher_contrast": 1.2,
            "student_diversity": 0.0,
            "teacher_diversity": 0.0,  # no sample at pure noise
            "gradient_student": 0.5,
            "gradient_critic": 2.0,
            "discriminator_real": 1.5,
            "discriminator_fake": -0.5,
            "pull_distillation": 1.0,
            "pull_dmd": 3.0,
        }
    )
    assert figures == {
        "total": 3.0,
        "gradient_student": 0.5,
        "gradient_critic": 2.0,
        "discriminator_real": 1.5,
        "discriminator_fake": -0.5,
        "discriminator_gap": 2.0,
        "latent_error": 0.5,
        "latent_contrast": 0.75,
        "critic_to_student": 4.0,
        "share_distillation": 0.25,
        "share_dmd": 0.75,
    }
    assert health_figures({"total": 1.0, "pull_distillation": 2.0}) == {"total": 1.0}  # one term alone has no share


def test_pictures_that_fade_to_grey_lose_what_they_lose() -> None:
    """0.2 + 0.6 x: contrast, colour, edges and differences fall to 0.6, and the mean of 0.5 stays."""
    teacher = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = drift(0.2 + 0.6 * teacher, teacher)
    assert found.pop("luminance") == pytest.approx(1, abs=0.01)
    assert found == pytest.approx(dict.fromkeys(("saturation", "contrast", "sharpness", "diversity"), 0.6), rel=1e-4)
    assert set(drift(teacher[:1], teacher[:1])) == {"luminance", "saturation", "contrast", "sharpness"}
    assert set(drift(teacher, teacher.mean(1, keepdim=True).expand_as(teacher))) >= {"luminance", "contrast"}
    assert "saturation" not in drift(teacher, teacher.mean(1, keepdim=True).expand_as(teacher))  # the teacher is grey


def test_diversity_is_the_root_mean_square_over_all_pairs() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pairs = [(one - other).square().mean() for one, other in itertools.combinations(images, 2)]
    torch.testing.assert_close(diversity(images), torch.stack(pairs).mean().sqrt())


# -- rules on made-up logs -------------------------------------------------------------------------------------------


@pytest.fixture
def watched(recipe_content: dict[str, Any]) -> Recipe:
    """A recipe of 400 updates in two phases: windows of 20 updates."""
    terms = {"modes": [1, 1, 1, 1], "updates": 200}
    phases = [{"name": "plain", **terms}, {"name": "sharp", "adversarial": 0.3, "dmd": 0.7, **terms}]
    return parse_recipe({**recipe_content, "phases": phases, "optimizer": {"lr": 0.004}})


def lines(
    figure: str, values: Iterable[float], *, first: int = 10, step: int = 10, **facts: Any
) -> list[dict[str, Any]]:
    """Return lines of a log with one figure."""
    return [{"update": first + step * at, "phase": "plain", figure: value, **facts} for at, value in enumerate(values)]


def told(recipe: Recipe, entries: Sequence[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Return (update, kind, sentence) of everything that a monitor says."""
    monitor = HealthMonitor(recipe)
    return [
        (entry["update"], kind, sentence)
        for entry in entries
        for kind, sentences in monitor.observe(entry).items()
        for sentence in sentences
    ]


def test_a_loss_of_contrast_is_told_once_with_its_cause_and_once_when_it_is_over(watched: Recipe) -> None:
    values = [0.6, 0.8, 0.9, 0.97, 0.97, 0.9, 0.8, 0.78, 0.75, 0.8, 0.95, 0.96, 0.96]
    entries = lines("picture_contrast", values, phase="sharp", share_dmd=0.7, share_distillation=0.3)
    assert told(watched, entries) == [
        (
            70,
            "warnings",
            "the student's pictures lose contrast since update 50: 0.80 of the teacher's, 0.97 then. "
            "Lower phases.1.dmd (0.7), which is 70% of the pull, or raise phases.1.distillation (1)",
        ),
        (110, "over", "the student's pictures' contrast is 0.95 of the teacher's"),
    ]


def test_too_much_contrast_without_other_terms_is_the_learning_rate(watched: Recipe) -> None:
    (only,) = told(watched, lines("picture_contrast", [0.8, 0.9, 1.0, 1.1, 1.2]))
    assert only[0] == 50
    assert only[2].endswith(
        "gain contrast since update 30: 1.20 of the teacher's, 1.00 then. Lower optimizer.lr (0.004)"
    )


def test_figures_of_lines_are_smoothed(watched: Recipe) -> None:
    """Single lines 20 % off raise no alarm between sound ones; two in a row do."""
    assert told(watched, lines("latent_contrast", [0.95, 1, 1.25, 1, 0.95, 1, 0.8, 1, 1, 0.95])) == []
    (only,) = told(watched, lines("latent_contrast", [1, 1, 1, 0.7, 0.7, 0.7]))
    assert only[:2] == (40, "warnings")  # the mean of two lines is then 0.85, a factor of 1.18


def test_the_first_window_must_be_full(watched: Recipe) -> None:
    assert told(watched, lines("discriminator_accuracy", [0.5] * 9)) == []
    ((update, _, sentence),) = told(watched, lines("discriminator_accuracy", [0.5] * 40))
    assert update == 100
    assert "in 50% of the pairs (chance: 50 %)" in sentence
    assert "method.adversarial_timesteps" in sentence
    assert "optimizer.discriminator_lr (1e-05)" in sentence
    assert told(watched, lines("discriminator_accuracy", [0.62] * 40)) == []


def test_a_new_phase_is_judged_anew(watched: Recipe) -> None:
    """Starts at pure noise have a larger loss: no alarm. A loss that grows fourfold inside a phase is one."""
    first = lines("distillation", [0.3, 0.2, 0.1, 0.1, 0.1])
    second = lines("distillation", [0.4, 0.4, 0.4], first=60, phase="sharp")
    assert told(watched, first + second) == []
    sick = lines("distillation", [0.1, 0.1, 0.5, 0.5], first=60)
    (begins,) = told(watched, first + sick)
    assert begins[2].startswith("the distillation loss has grown since update ")
    last = told(watched, first + sick + lines("distillation", [0.4], first=100, phase="sharp"))[-1]
    assert last == (100, "over", "phase sharp begins, whose distillation is judged anew")


@pytest.mark.parametrize("seed", range(3))
def test_a_monitor_that_goes_on_says_what_one_that_never_stopped_says(watched: Recipe, seed: int) -> None:
    source = random.Random(seed)
    names = [rule.figure for rule in RULES]
    entries = [
        {
            "update": 5 * at,
            "phase": "plain" if at < 30 else "sharp",
            **{name: source.uniform(0.2, 1.6) for name in source.sample(names, 6)},
        }
        for at in range(1, 60)
    ]
    whole = told(watched, entries)
    assert {kind for _, kind, _ in whole} == {"warnings", "over"}
    for cut in (1, 17, 40, 59):
        monitor = HealthMonitor(watched, entries[:cut])
        rest = [monitor.observe(entry) for entry in entries[cut:]]
        later = [text for found in rest for sentences in found.values() for text in sentences]
        assert later == [text for update, _, text in whole if update > 5 * cut]


def test_every_rule_has_words_and_advice_in_fields_that_exist(watched: Recipe) -> None:
    shares = {"share_distillation": 0.1, "share_adversarial": 0.9}
    for rule in RULES:
        sentence = f"{rule.words(0.5, 1.0, 1200)}. {advice(rule, watched, 'sharp', shares)}. {rule.good(1.0)}"
        assert "{" not in sentence
        assert any(field in sentence for field in ("phases.1.adversarial (0.3)", "optimizer.", "method.")), sentence
        assert "1200" not in sentence  # 1,200


def test_a_phase_that_the_recipe_no_longer_has_is_advised_too(watched: Recipe) -> None:
    entries = lines("picture_contrast", [1.0, 0.7], phase="renamed", share_dmd=0.7, share_distillation=0.3)
    assert told(watched, entries)[0][2].endswith("Lower optimizer.lr (0.004)")


def test_the_summary_says_what_lasts(watched: Recipe) -> None:
    assert HealthMonitor(watched).summary() == ""
    sound = HealthMonitor(watched, lines("picture_contrast", [0.9, 1.0], picture_luminance=1.01))
    assert sound.summary() == (
        "Nothing was found wrong. The last preview's pictures, the student's divided by the teacher's: contrast 1.00, "
        "luminance 1.01."
    )
    sick = HealthMonitor(watched, lines("picture_contrast", [1.0, 0.7, 1.0, 0.6]))
    assert sick.summary().startswith(
        "1 warning was over before the end. To the end: The student's pictures lose contrast since update 30: 0.60 "
    )


# -- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_tells_its_health_in_log_report_and_card(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    recipe_content["method"]["fake_score"] = "critic"
    recipe_content["preview"] = {"every": 2, "prompts": ["red ball", "green box"], "steps": [1, 2]}
    recipe = parse_recipe(recipe_content)
    distil(recipe, tmp_path)
    entries = [entry for _, entry in read_lines(tmp_path / "log.jsonl") if entry is not None]
    updates, previews = ([entry for entry in entries if is_preview(entry) is kind] for kind in (False, True))
    assert [entry["update"] for entry in previews] == [2, 4, 5]
    assert {"picture_saturation", "picture_diversity"} <= set(previews[0])
    assert {
        "latent_contrast", "share_dmd", "share_adversarial", "critic_to_student", "discriminator_real",
        "discriminator_fake",
    } <= set(updates[-1])  # fmt: skip
    assert not [name for name in updates[-1] if name.startswith(("student_", "teacher_", "pull_"))]
    assert updates[-1]["share_dmd"] + updates[-1]["share_adversarial"] + updates[-1]["share_distillation"] == (
        pytest.approx(1, abs=1e-5)
    )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Health\n\n" in card
    # The same paragraph when a checkpoint is exported; a resumed run adds no line for what is there.
    export_checkpoint(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card
    distil(recipe, tmp_path, resume=True)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").open()] == entries


def test_a_sick_run_warns_and_a_sound_one_does_not(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    """The same run of 40 updates at a rate that learns, and at a hundred times that rate."""
    recipe_content |= {
        "phases": [{"name": "fit", "updates": 40, "modes": [1, 0, 0, 0]}],
        "trajectories": {"count": 2, "batch": 2},
        "checkpoint": {"every": 0},
        "log_every": 5,
    }
    found = {}
    for name, rate in (("sound", 3e-3), ("sick", 0.3)):
        recipe_content["optimizer"] = {"lr": rate}
        distil(parse_recipe(recipe_content), tmp_path / name)
        entries = [entry for _, entry in read_lines(tmp_path / name / "log.jsonl") if entry is not None]
        found[name] = list(health_findings(entries))
    assert found["sound"] == []
    sentences = [finding.text for finding in found["sick"] if not finding.good]
    assert any("gradient has the norm" in text and "Lower optimizer.lr (0.3)" in text for text in sentences), sentences
