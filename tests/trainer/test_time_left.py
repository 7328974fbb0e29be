"""The time left of a run: every stage at its measured cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flash_diffusion.trainer.config import parse_recipe
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.distill.passes import (
    recorded_trajectories,
    solution_passes,
    step_passes,
    trajectory_passes,
    update_passes,
    warmup_passes,
)
from flash_diffusion.trainer.distill.time_left import Stage, TimeLeft, phase_stages, recording_stage
from flash_diffusion.trainer.distill.training_log import TrainingLog
from flash_diffusion.trainer.progress import in_words


def test_nothing_measured_is_unknown_or_the_limit() -> None:
    estimate = TimeLeft([Stage(units=10, passes=2)])
    assert estimate.seconds() is None
    assert estimate.seconds(60) == 60
    assert estimate.share() == 0


def test_unmeasured_stages_cost_their_passes() -> None:
    """4 units of 2 passes took 16 s: 2 s a pass. Left: 6 units of 4 s, 10 units of 3 passes."""
    estimate = TimeLeft([Stage(units=10, passes=2), Stage(units=10, passes=3)])
    estimate.advance(4, 16.0)
    assert estimate.seconds() == 6 * 4 + 10 * 3 * 2
    assert estimate.share() == 16 / (16 + 84)


def test_a_measured_stage_costs_what_it_took() -> None:
    estimate = TimeLeft([Stage(units=4, passes=1), Stage(units=10, passes=1)])
    estimate.advance(4, 4.0)
    estimate.advance(2, 20.0)
    assert estimate.seconds() == 8 * 10
    assert estimate.share() == 24 / (24 + 80)


def test_units_reach_into_the_next_stage_by_passes() -> None:
    """2 units of 1 pass and 1 unit of 4 passes took 12 s: 4 s and 8 s."""
    first, second = Stage(units=2, passes=1), Stage(units=3, passes=4)
    TimeLeft([first, second]).advance(3, 12.0)
    assert (first.done, first.seconds, second.done, second.seconds) == (2, 4.0, 1, 8.0)


def test_units_of_an_earlier_session_count_but_cost_nothing_now() -> None:
    estimate = TimeLeft([Stage(units=10, passes=1)])
    estimate.advance(5, None)
    assert estimate.seconds() is None
    estimate.advance(1, 3.0)
    assert estimate.seconds() == 4 * 3
    assert estimate.share() == 6 / 10


def test_a_limit_is_the_most_that_is_left() -> None:
    estimate = TimeLeft([Stage(units=10, passes=1)])
    estimate.advance(1, 10.0)
    assert estimate.seconds(30) == 30
    assert estimate.share(30) == 10 / 40


def test_stages_of_a_recipe(recipe_content: dict[str, Any]) -> None:
    recipe_content["trajectories"] = {"count": 6, "batch": 2}
    recipe = parse_recipe(recipe_content)
    assert recording_stage(recipe, 6).passes == 2 * recipe.method.teacher_steps
    first, second = phase_stages(recipe, updates=3)
    assert (first.units, first.done) == (2, 2)
    assert (second.units, second.done) == (3, 1)
    samples = recipe.batch_size * recipe.gradient_accumulation
    assert first.passes == 3 * samples  # the student alone, replayed
    assert second.passes == (3 + 4 + 3) * samples  # and adversarial, and DMD without a critic


def passes(content: dict[str, Any], **method: Any) -> dict[str, float]:
    """Return the passes of an update of the second phase, for one sample."""
    content = {**content, "batch_size": 1, "method": {"teacher_steps": 4, "guidance": [2, 2], **method}}
    recipe = parse_recipe(content)
    return update_passes(recipe, recipe.phases[1])


def test_passes_of_each_term_by_hand(recipe_content: dict[str, Any]) -> None:
    """Start at pure noise: 4 steps of the teacher, with guidance. Three passes are a forward and a backward one."""
    recipe_content["phases"][1] |= {"modes": [1, 0, 0, 0], "feature_matching": 0.1, "intra_segment": 0.2}
    noise = 1 / (1 + math.exp(-2))  # of the starts are pure noise, the others one step later (timestep mixture, K = 4)
    paper = passes(recipe_content)
    assert paper["solutions"] == pytest.approx(2 * (4 * noise + 3 * (1 - noise)), abs=2e-3)
    rest = {name: value for name, value in paper.items() if name != "solutions"}
    expected = {"student": 3, "adversarial": 3, "discriminator": 1, "dmd": 3, "feature matching": 4, "intra segment": 3}
    assert rest == expected
    critic = {"fake_score": "critic", "dmd": {"form": "decoupled", "rows": "first_step"}}
    first = passes(
        recipe_content, **critic, critic={"updates": 2}, discriminator={"updates": 3}, feature_rows="first_step"
    )
    assert first["dmd"] == pytest.approx(4 * noise, abs=2e-3)
    assert first["critic"] == pytest.approx(2 * 3 * noise, abs=2e-3)
    assert first["feature matching"] == pytest.approx(4 * noise, abs=2e-3)
    assert first["discriminator"] == 1 + 2 * 2  # the first update sees the fake samples of the student's loss
    assert passes(recipe_content, **critic, critic={"memory": 8})["critic"] == 3  # whole batches from the memory
    unguided = passes(recipe_content, dmd={"guidance": 1}, adversarial="relativistic")
    assert (unguided["dmd"], unguided["adversarial"]) == (2, 4)
    assert "discriminator" not in unguided  # its pairs are those of the student's loss
    own = passes(recipe_content, states={"student": 0.5, "trajectory": 0.25})
    assert own["own states"] == pytest.approx(0.5 * (1 - noise), abs=2e-3)  # one step of the student each
    assert own["solutions"] == pytest.approx(paper["solutions"] + 0.25 * 2 * (1 - noise), abs=2e-3)


def test_updates_of_discriminator_and_critic_alone_are_counted(recipe_content: dict[str, Any]) -> None:
    recipe_content |= {"batch_size": 1, "trajectories": {"count": 2, "batch": 2}}
    recipe_content["method"] |= {
        "fake_score": "critic",
        "critic": {"warmup": 5, "updates": 2},
        "discriminator": {"warmup": 3},
    }
    recipe = parse_recipe(recipe_content)
    # 5 critic updates of 3 passes, 3 discriminator updates of 2, and 5 outputs of the student.
    assert warmup_passes(recipe, recipe.phases[1]) == 5 * 3 + 3 * 2 + 5


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "?"), (40.4, "40 s"), (600, "10 min"), (5400, "1.5 h"), (100_000, "27.8 h")]
)
def test_times_in_words(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words


def test_one_bar_runs_over_recording_and_updates(
    recipe_content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_content |= {"trajectories": {"count": 5, "batch": 2}}
    shown: list[tuple[float, str]] = []
    monkeypatch.setattr(TrainingLog, "show", lambda _, share, left, note: shown.append((share, note)))
    distil(parse_recipe(recipe_content), tmp_path)
    notes = [note.partition(", ")[0] for _, note in shown]
    recorded = [f"{count} of 5 teacher trajectories" for count in (2, 4, 5)]
    assert notes == [
        *recorded,
        *(f"update {update}" for update in range(1, 6)),
        "5 updates; writing the last checkpoint",
    ]
    assert all(0 < share < 1 for share, _ in shown[:-2])
    assert [share for share, _ in shown[-2:]] == [1, 1]


COUNTED: dict[str, Any] = {
    "paper": {},
    "every term": {
        "method": {
            "teacher_steps": 4,
            "guidance": [1.5, 3.0],
            "states": {"student": 0.5},
            "adversarial": "relativistic",
            "discriminator": {"updates": 2},
            "fake_score": "critic",
            "dmd": {"form": "decoupled"},
            "critic": {"updates": 2, "memory": 5},
        },
        "trajectories": {"count": 8, "batch": 2, "reuse": 2},
    },
    "guided on an interval": {"method": {"teacher_steps": 4, "guidance": [2, 2], "guidance_interval": [400, 999]}},
    "unguided": {"method": {"teacher_steps": 4, "guidance": [1, 1]}, "trajectories": {"count": 4, "batch": 2}},
}
DRAWN = {"solutions", "own states", "dmd", "intra segment"}  # their passes depend on the noise levels that a run draws


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_counts_what_a_run_asks_the_network_for(
    recipe_content: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """The log counts the calls of the run itself; random noise levels leave a difference in three terms."""
    phase = {**recipe_content["phases"][1], "updates": 16, "feature_matching": 0.1, "intra_segment": 0.2}
    recipe = parse_recipe({**recipe_content, "phases": [phase], "log_every": 16, **COUNTED[name]})
    distil(recipe, tmp_path)
    line, _ = [json.loads(text) for text in (tmp_path / "log.jsonl").open()]  # the second is the last preview's
    planned = {term: value / recipe.batch_size for term, value in update_passes(recipe, recipe.phases[0]).items()}
    counted = line["passes"]
    if recipe.trajectories.reuse:  # the rounds begin small: 4, 8, 8, 8, 8 samples, each with 4 new trajectories
        assert counted["trajectories"] * 32 == recorded_trajectories(recipe) * trajectory_passes(recipe.method)
        planned["trajectories"] = counted["trajectories"]
    assert set(counted) == set(planned)
    for term, value in planned.items():
        assert counted[term] == pytest.approx(value, rel=0.3 if term in DRAWN and name != "unguided" else 1e-3), term
    assert bool(line["unconditional"]) == (name != "unguided")


def test_teacher_passes_on_an_interval_by_hand(recipe_content: dict[str, Any]) -> None:
    """Of the steps at 999, 749, 499 and 249 two are guided; DMD's levels 400..999 are 600 of 1,000."""
    recipe_content["method"] = {"teacher_steps": 4, "guidance": [2, 2], "guidance_interval": [500, 999]}
    method = parse_recipe(recipe_content).method
    assert step_passes(method) == [2, 2, 1, 1]
    assert trajectory_passes(method) == 6
    assert solution_passes([0, 1, 0, 0], step_passes(method)) == 4
    found = passes(recipe_content, guidance_interval=[400, 999])
    assert found["dmd"] == pytest.approx(1 + 1 + 0.6)


def test_trajectories_of_a_bank_are_counted_with_its_first_rounds(recipe_content: dict[str, Any]) -> None:
    """A bank of 8 with 2 uses: rounds of 4, 8, 8, ... samples; 7 updates of 2 end in the third."""
    recipe_content |= {"trajectories": {"count": 8, "batch": 2, "reuse": 2}}
    recipe_content["phases"] = [{**recipe_content["phases"][0], "updates": 6}]
    assert recorded_trajectories(parse_recipe(recipe_content)) == 8
    recipe_content["phases"][0]["updates"] = 7
    assert recorded_trajectories(parse_recipe(recipe_content)) == 12
