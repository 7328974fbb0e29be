"""Check metrics against scipy and values worked by hand; reference sets and report on a model solved exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.flash_core.measures import distances as measures
from flash_diffusion.flash_core.process import FlowProcess, VPProcess
from flash_diffusion.flash_core.settings import DistillerSettings
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.evaluate.generate import (
    SamplingSetting,
    decode_pictures,
    default_solver,
    interval_note,
    noise_source,
    sample_latents,
    sampler_note,
)
from flash_diffusion.trainer.evaluate.request import Options
from flash_diffusion.trainer.evaluate.teacher.reference import Origin, Reference, draw
from flash_diffusion.trainer.evaluate.teacher.targets import Gap, targets_of
from flash_diffusion.trainer.evaluate.teacher_comparison import (
    TeacherComparison,
    few_step_runs,
    fitting_classes,
)
from flash_diffusion.trainer.files import fingerprint
from flash_diffusion.trainer.metrics import distances as metrics
from flash_diffusion.trainer.metrics.feature_network import FeatureNetwork
from flash_diffusion.trainer.metrics.pictures.preference import Preference

from .models import CAPTIONS
from .paints import COLOURS, SHAPE, SPREAD, Paints
from .stand_ins import random_lora


class Eye:
    """A feature network: the colour of each quadrant, and the nearest of the colours' names."""

    classes = tuple(COLOURS)
    title = "an eye"
    general = ("primary", "primary", "primary", "grey")

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour = torch.nn.functional.avg_pool2d(images, 2)
        mean = (images.mean((2, 3)) - 0.5) * 6
        wanted = torch.tensor(list(COLOURS.values()))
        return colour.flatten(1), -torch.cdist(mean, wanted)


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_frechet_distance_is_scipys_formula() -> None:
    source = np.random.default_rng(0)
    left = source.normal(size=(60, 5)) @ source.normal(size=(5, 5))
    right = source.normal(size=(50, 5)) + 0.7
    covariances = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((left.mean(0) - right.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    value = measures.frechet_distance(torch.from_numpy(left), torch.from_numpy(right))
    assert value == pytest.approx(expected, rel=1e-9)
    moments = [metrics.Moments.of(torch.from_numpy(features)) for features in (left, right)]
    assert moments[0].distance(moments[1]) == pytest.approx(value, rel=1e-9)  # torchmetrics' own way


def test_frechet_distance_in_one_dimension_by_hand() -> None:
    # Means 1 and 5, variances 2 and 8 (N - 1): (1 - 5)^2 + (sqrt 2 - sqrt 8)^2 = 16 + 2.
    left, right = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [7.0]])
    assert measures.frechet_distance(left, right) == pytest.approx(18.0)


def test_frechet_distance_of_fewer_samples_than_dimensions() -> None:
    features = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    assert measures.frechet_distance(features, features) == pytest.approx(0, abs=1e-4)
    assert measures.frechet_distance(features + 0.5, features) == pytest.approx(64 * 0.25, rel=1e-4)


@given(st.integers(0, 2**31), st.floats(-3, 3))
def test_frechet_distance_of_a_shifted_set_is_the_shift_squared(seed: int, shift: float) -> None:
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = features + shift
    assert measures.frechet_distance(moved, features) == pytest.approx(3 * shift**2, abs=1e-6)
    assert measures.frechet_distance(moved, features) == pytest.approx(measures.frechet_distance(features, moved))


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    source = np.random.default_rng(1)
    left, right = source.normal(size=(9, 4)), source.normal(size=(9, 4)) + 1
    kernel = lambda x, y: (x @ y / 4 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(one[i], one[j]) for i in range(9) for j in range(9) if i != j]) for one in (left, right)]
    between = np.mean([kernel(x, y) for x in left for y in right])
    value = metrics.kernel_distance(torch.from_numpy(left), torch.from_numpy(right))
    assert value == pytest.approx(sum(within) - 2 * between, rel=1e-9)


def test_kernel_distance_from_a_larger_set_uses_all_of_it() -> None:
    source = torch.Generator().manual_seed(0)
    features, reference = torch.randn(30, 4, generator=source), torch.randn(90, 4, generator=source) + 0.5
    terms = [((one @ other.T / 4 + 1) ** 3).double() for one, other in
             ((features, features), (reference, reference), (features, reference))]  # fmt: skip
    within = sum((term.sum() - term.trace()) / (len(term) * (len(term) - 1)) for term in terms[:2])
    exact = float(within - 2 * terms[2].mean())
    assert metrics.kernel_distance(features, reference) == pytest.approx(exact, rel=0.1)


def test_kernel_distance_leaves_the_global_generator_alone() -> None:
    features = torch.randn(8, 3)
    torch.manual_seed(5)
    metrics.kernel_distance(features, features[:6])
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)


def test_paired_distance_by_hand() -> None:
    left, right = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 4.0], [1.0, 2.0]])
    assert measures.paired_distance(left, right) == pytest.approx(3.0)  # (5 + 1) / 2
    with pytest.raises(ValueError, match="same prompts and seeds"):
        measures.paired_distance(left, right.repeat(2, 1))


def test_prompt_accuracy_counts_known_prompts_only() -> None:
    assert metrics.prompt_accuracy(torch.tensor([0, 1, 2, 3]), [{0}, {2}, set(), {1, 3}]) == pytest.approx(2 / 3)
    assert metrics.prompt_accuracy(torch.tensor([0]), [set()]) is None


def test_diversity_by_hand() -> None:
    # "a": distances 3, 4, 5, mean 4. "b": 2. "c" has one picture and says nothing. Prompts count alike: (4 + 2) / 2.
    features = torch.tensor([[0.0, 0], [3, 0], [0, 4], [9, 9], [9, 11], [5, 5]])
    assert measures.diversity(features, ["a", "a", "a", "b", "b", "c"]) == pytest.approx(3.0)
    assert measures.diversity(features[3:], ["a", "b", "c"]) is None
    assert measures.diversity(torch.ones(4, 2), ["a"] * 4) == 0


def test_metrics_refuse_nan_wrong_shapes_and_single_samples() -> None:
    good = torch.randn(4, 3)
    with pytest.raises(ValueError, match="one feature network"):
        measures.frechet_distance(good, torch.randn(4, 2))
    with pytest.raises(ValueError, match="diverged"):
        metrics.kernel_distance(good * float("nan"), good)
    with pytest.raises(ValueError, match="at least 2"):
        measures.frechet_distance(good[:1], good)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [FlowProcess(), VPProcess.from_betas(prediction="v_prediction")])
@pytest.mark.parametrize(
    "run",
    [
        SamplingSetting("teacher", 8, 3.0),
        SamplingSetting("teacher", 8, 3.0, (250, 750)),
        SamplingSetting("teacher", 4),
        SamplingSetting("student", 4),
        SamplingSetting("student", 1),
    ],
)
def test_seed_gives_one_picture_in_any_batch_and_nfe_counts_passes(
    run: SamplingSetting, process: VPProcess | FlowProcess
) -> None:
    model = Paints(0.2, process)
    prompts, seeds = ["red", "blue", "green"], [7, 8, 9]
    together = sample_latents(model, run, prompts, seeds)
    assert model.passes == 3 * run.nfe
    alone = [sample_latents(model, run, [prompt], [seed]) for prompt, seed in zip(prompts, seeds, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)
    pictures = decode_pictures(model, together)
    assert pictures.shape == (3, *SHAPE)
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_student_renoises_with_fresh_noise_on_the_trailing_grid() -> None:
    model = Paints(0.2)
    generator = torch.Generator().manual_seed(3)
    mean = torch.tensor(COLOURS["red"])[:, None, None] + 0.2
    z0 = torch.zeros(SHAPE)
    for sigma in (1.0, 0.75, 0.5, 0.25):
        z = (1 - sigma) * z0 + sigma * torch.randn(*SHAPE, generator=generator)
        gain = (1 - sigma) * SPREAD**2 / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
        z0 = mean + gain * (z - (1 - sigma) * mean)
    torch.testing.assert_close(sample_latents(model, SamplingSetting("student", 4), ["red"], [3])[0], z0)


def test_student_without_fresh_noise_keeps_the_implied_noise() -> None:
    """The flow student of stochasticity 0 takes Euler steps: eps = (z - (1 - sigma) z0) / sigma, by hand."""
    model = Paints(0.2)
    model.stochasticity = {4: 0.0}  # and so the nearest value for 2 steps
    mean = torch.tensor(COLOURS["red"])[:, None, None] + 0.2
    noise = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(3))
    z0 = torch.zeros(SHAPE)
    for sigma in (1.0, 0.75, 0.5, 0.25):
        z = (1 - sigma) * z0 + sigma * noise
        gain = (1 - sigma) * SPREAD**2 / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
        z0 = mean + gain * (z - (1 - sigma) * mean)
        noise = (z - (1 - sigma) * z0) / sigma
    torch.testing.assert_close(sample_latents(model, SamplingSetting("student", 4), ["red"], [3])[0], z0)
    assert sampler_note(model, (4, 2, 1)) == [
        "Stochasticity of the student's sampler: 0 at 4 steps, 0 at 2 steps (1 = fresh noise at every step, 0 = "
        "deterministic)."
    ]
    assert sampler_note(Paints(), (4, 2, 1)) == []


def test_teacher_solves_its_ode_with_guidance() -> None:
    # Without guidance the flow carries noise eps to mean + SPREAD eps, whatever the mean.
    model = Paints()
    noise = noise_source([1, 2], SHAPE, "cpu")()
    latents = sample_latents(model, SamplingSetting("teacher", 400), ["red", "red"], [1, 2])
    expected = torch.tensor(COLOURS["red"])[:, None, None] + SPREAD * noise
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.02)
    guided = sample_latents(model, SamplingSetting("teacher", 400, 2.0), ["red", "red"], [1, 2])
    assert (guided - latents)[:, 0].mean() > 0.1  # away from grey, toward more red
    assert default_solver(model.process) == "euler"
    assert default_solver(VPProcess.from_betas()) == "dpmpp_2m"


def test_reference_is_guided_on_the_interval_of_the_training() -> None:
    model, prompts, seeds = Paints(), ["red", "blue"], [1, 2]
    settings = DistillerSettings(8, "euler", (3, 3), guidance_interval=(250, 750))
    found = sample_latents(model, SamplingSetting("teacher", 8, 3.0, (250, 750)), prompts, seeds)
    conditions = model.encode_prompts(prompts), model.unconditional(2)
    noise = noise_source(seeds, SHAPE, "cpu")()
    wanted = Distiller(model.denoiser, settings).teacher_solution(noise, *conditions, torch.full((2,), 3.0), [0, 0])
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(
        found, sample_latents(model, SamplingSetting("teacher", 8, 3.0), prompts, seeds), atol=0.02
    )
    assert interval_note(SamplingSetting("teacher", 8, 3.0, (250, 750))) == [
        "The teacher's 8 steps are guided at noise levels 250 to 750 of 0 to 999, as in training."
    ]
    assert interval_note(SamplingSetting("teacher", 8, 3.0)) == []


def test_sampling_setting_has_a_name_and_counts_passes() -> None:
    runs = [
        SamplingSetting("teacher", 32, 2.5),
        *few_step_runs(2.5),
        SamplingSetting("student", 4),
        SamplingSetting("student", 1),
    ]
    assert {run.name: run.nfe for run in runs} == {
        "teacher 32 steps, guided": 64,
        "teacher 4 steps, guided": 8, "teacher 2 steps, guided": 4, "teacher 1 step, guided": 2,
        "teacher 8 steps": 8, "teacher 4 steps": 4, "teacher 2 steps": 2, "teacher 1 step": 1,
        "student 4 steps": 4, "student 1 step": 1,
    }  # fmt: skip


# -- reference sets --------------------------------------------------------------------------------------------------


def test_draw_begins_with_the_smaller_draw_and_pairs_prompts() -> None:
    prompts = [str(number) for number in range(10)]
    small, large = draw(prompts, 8, 0, 1), draw(prompts, 30, 0, 1)
    assert large.rows(range(8)) == small
    assert small.prompts[0::2] == small.prompts[1::2]
    assert len(set(small.prompts)) == 4
    assert {large.prompts.count(prompt) for prompt in prompts} == {2, 4}


def test_two_sets_have_the_same_prompts_and_other_seeds() -> None:
    prompts = [str(number) for number in range(10)]
    second, first = draw(prompts, 8, 0, 1), draw(prompts, 8, 0, 0, times=3)
    assert first.prompts == second.prompts * 3
    assert not set(first.seeds) & set(second.seeds)
    assert draw(prompts, 8, 1, 1).prompts != second.prompts


def test_sets_share_no_noise() -> None:
    # The CPU's generator reads 32 bits of a seed: seeds that differ above them only would give the same noise.
    seeds = [*draw(["a"], 300, 0, 0).seeds, *draw(["a"], 300, 0, 1).seeds, *draw(["a"], 300, 1, 0).seeds]
    assert len({tuple(noise_source([seed], (4,), "cpu")().flatten().tolist()) for seed in seeds}) == 900


def test_reference_survives_its_file_and_names_a_mismatch(tmp_path: Path) -> None:
    report = run_evaluation(tmp_path)
    reference = Reference.load(tmp_path / "reference.safetensors")
    origin = reference.origin
    assert (origin.samples, origin.steps, origin.guidance, origin.solver) == (24, 16, 2.0, "euler")
    assert reference.mismatch(origin) is None
    assert reference.mismatch(replace(origin, samples=10)) is None
    assert "samples is 24 there and 25 now" in str(reference.mismatch(replace(origin, samples=25)))
    assert "teacher is 'paints' there and 'other' now" in str(reference.mismatch(replace(origin, teacher="other")))
    smaller = reference.head(10)
    assert len(smaller.first.features) == 20
    torch.testing.assert_close(smaller.first.features[10:], reference.first.features[24:34])
    assert len(reference.head(10).few["teacher 1 step"].features) == 10
    floor = measures.frechet_distance(reference.second.features, reference.first.features)
    assert report["floor"]["fd"] == pytest.approx(floor)
    other = tmp_path / "other.safetensors"
    for header, was in (({}, "is no reference file"), ({"flash.reference": '{"version": 1}'}, "is of version 1")):
        save_file({"a": torch.zeros(1)}, other, header)
        with pytest.raises(UserError, match=f"{was}, expected a reference file of version 2.*--make-reference"):
            Reference.load(other)


def test_fingerprint_depends_only_on_weights_and_configuration(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        fingerprint(tmp_path)
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"weights")
    config = tmp_path / "unet" / "config.json"
    config.write_text('{"a": 1, "b": 2}')
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "training.json").write_text("{}")
    config.write_text('{"b": 2,\n "a": 1, "_name_or_path": "/elsewhere"}')
    assert fingerprint(tmp_path) == before
    config.write_text('{"a": 1, "b": 3}')
    changed = fingerprint(tmp_path)
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"Weights")
    assert len({before, changed, fingerprint(tmp_path)}) == 3


def test_prompt_fits_its_class_or_all_classes_of_its_caption() -> None:
    known = {prompt: fitting_classes(Eye(), prompt) for prompt in ("red", "white", "primary", "grey", "purple")}
    assert known == {"red": {0}, "white": {3}, "primary": {0, 1, 2}, "grey": {3}, "purple": set()}


def test_prompt_is_drawn_as_often_as_it_is_listed() -> None:
    drawn = draw(["a", "b", "a"], 60, 0, 0).prompts
    assert drawn.count("a") == 2 * drawn.count("b") == 40


# -- the whole -------------------------------------------------------------------------------------------------------

OPTIONS = Options(samples=24, steps=16, guidance=2.0, batch_size=10, pictures=3)


def run_evaluation(output: Path, model: Paints | None = None, student: str | None = "s", **settings: object) -> dict:
    options = replace(OPTIONS, **{name: value for name, value in settings.items() if name in OPTIONS.__dict__})
    others = {name: value for name, value in settings.items() if name not in OPTIONS.__dict__}
    known = {"teacher": "paints", "features": "eye"}
    return TeacherComparison(
        model or Paints(), Eye(), list(COLOURS), options, output=output, student=student, **(known | others)
    ).evaluate()


def test_report_has_its_schema_and_files(tmp_path: Path) -> None:
    report = run_evaluation(tmp_path, samples=36)  # 3 for each of the eye's 12 features
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert set(report["floor"]) == {"fd", "kid"}
    scores = ["fd", "kid", "paired", "prompt_accuracy", "diversity", "precision", "recall", "sharpness", "contrast"]
    for line in report["runs"]:
        assert list(line) == [
            *("name", "steps", "guidance", "nfe", *scores), "kinds", "intervals", "seeds", "seconds_per_image"
        ]  # fmt: skip
        assert line["fd"] == line["kinds"]["features"]["fd"]["value"] >= 0
        assert set(line["kinds"]) == {"features", "states", "random"}
        assert {"kid", "paired", "diversity", "sharpness", "contrast", "precision", "recall"} <= set(line["intervals"])
        assert all(found["low"] <= found["value"] <= found["high"] for found in line["intervals"].values())
        assert line["seconds_per_image"] > 0
    assert [line["name"] for line in report["runs"]][:2] == ["teacher 16 steps, guided", "student 1 step"]
    assert len(report["runs"]) == 1 + 4 + 4 + 3
    assert [target["kind"] for target in report["targets"]] == ["floor"] * 3 + ["diversity"] * 3 + ["accuracy"] * 3
    assert [gap["steps"] for gap in report["gaps"]] == [1, 2, 4, 8]
    assert [entry["kind"] for entry in report["curve"]] == ["features", "states", "random"]
    assert len(set(report["pictures"]["prompts"])) == 3
    for files in report["pictures"]["files"].values():
        assert len(files) == 3
        assert all((tmp_path / name).is_file() for name in files)


def test_teacher_in_many_steps_scores_the_floor_and_matches_itself(tmp_path: Path) -> None:
    report = run_evaluation(tmp_path)
    many = report["runs"][0]
    assert many["fd"] == report["floor"]["fd"] > 0
    assert many["kid"] == report["floor"]["kid"]
    assert many["paired"] == 0
    assert many["prompt_accuracy"] == 1


def test_worse_student_scores_worse(tmp_path: Path) -> None:
    """A student off in all its colours is farther in every distance, by the squared shift of its features in one."""
    close, off = (run_evaluation(tmp_path / str(bias), Paints(bias)) for bias in (0.0, 0.9))
    for line, other in zip(close["runs"][1:5], off["runs"][1:5], strict=True):
        assert line["name"] == other["name"]
        assert line["fd"] < other["fd"]
        assert line["kid"] < other["kid"]
        assert line["paired"] < other["paired"]
    assert close["runs"][5:] == [line | {"seconds_per_image": other["seconds_per_image"]}
                                 for line, other in zip(off["runs"][5:], close["runs"][5:], strict=True)]  # fmt: skip


def test_seed_decides_every_figure(tmp_path: Path) -> None:
    def numbers(seed: int, batch_size: int) -> list[dict]:
        report = run_evaluation(tmp_path / f"{seed}-{batch_size}", seed=seed, batch_size=batch_size)
        left = ("seconds_per_image", "kinds", "intervals", "seeds")
        return [{name: value for name, value in line.items() if name not in left} for line in report["runs"]]

    assert numbers(0, 10) == numbers(0, 10)
    for line, other in zip(numbers(0, 10), numbers(0, 7), strict=True):
        assert {**line, "name": 0} == pytest.approx({**other, "name": 0}, abs=1e-5)
    assert numbers(0, 10) != numbers(1, 10)


def test_stored_reference_is_used_and_a_wrong_reference_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, again = Paints(), Paints()
    before = run_evaluation(tmp_path / "first", first)
    references = [tmp_path / "missing.safetensors", tmp_path / "first" / "reference.safetensors"]
    after = run_evaluation(tmp_path / "again", again, references=references)
    assert not before["reference"]["stored"]
    assert after["reference"]["stored"]
    assert after["floor"] == before["floor"]
    # The set of many steps, a second one of twice its size, 4 + 2 + 1 steps with guidance, 8 + 4 + 2 + 1 without.
    assert first.passes - again.passes == OPTIONS.samples * ((2 + 1) * 2 * OPTIONS.steps + 2 * 7 + 15)
    assert first.feature_passes - again.feature_passes == OPTIONS.samples * (2 + 1 + 7)
    numbers = [{**line, "seconds_per_image": 0} for report in (before, after) for line in report["runs"]]
    assert numbers[:12] == numbers[12:]
    with caplog.at_level(logging.WARNING):
        other = run_evaluation(tmp_path / "other", teacher="retrained", references=references)
    assert not other["reference"]["stored"]
    assert "teacher is 'paints' there and 'retrained' now" in caplog.text


class Likes(Preference):
    """A preference model that likes red."""

    def __init__(self, fingerprint: str = "likes") -> None:
        super().__init__("likes red", fingerprint, lambda pictures, prompts: torch.zeros(0))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0].mean((1, 2)).cpu()


def test_preference_is_measured_for_every_run_and_kept_in_the_reference(tmp_path: Path) -> None:
    before = run_evaluation(tmp_path / "first", Paints(0.3), preference=Likes())
    assert before["preference"] == "likes red"
    scores = {run["name"]: run["preference"] for run in before["runs"]}
    # A bias of 0.3 in z is 0.05 in a picture: decode divides by 3, pictures by 2.
    assert scores["student 8 steps"] - scores["teacher 8 steps"] == pytest.approx(0.05, abs=0.01)
    references = [tmp_path / "first" / "reference.safetensors"]
    again = run_evaluation(tmp_path / "again", Paints(0.3), preference=Likes(), references=references)
    assert again["reference"]["stored"]
    assert {run["name"]: run["preference"] for run in again["runs"]} == pytest.approx(scores)
    without = run_evaluation(tmp_path / "without", references=references)
    assert without["reference"]["stored"]
    assert not any("preference" in run for run in without["runs"])
    other = run_evaluation(tmp_path / "other", preference=Likes("another"), references=references)
    assert not other["reference"]["stored"]


def test_seeds_are_sets_of_other_noise_and_figures_are_their_means(tmp_path: Path) -> None:
    model = Paints(0.2)
    report = run_evaluation(tmp_path / "two", model, seeds=2, samples=8)
    one = run_evaluation(
        tmp_path / "one", Paints(0.2), samples=8, references=[tmp_path / "two" / "reference.safetensors"]
    )
    for run, single in zip(report["runs"], one["runs"], strict=True):
        if not run["name"].startswith("student"):
            assert run["seeds"]["count"] == 1
            assert run["fd"] == single["fd"]
            continue
        assert run["seeds"]["count"] == 2
        # The first set is that of one seed; the deviation of two values is |a - b| / sqrt 2 = |a - mean| sqrt 2.
        deviation = run["seeds"]["deviations"]["fd"]
        assert deviation == pytest.approx(abs(single["fd"] - run["fd"]) * 2**0.5, abs=1e-9)
        assert run["paired"] == single["paired"]
    assert one["reference"]["stored"]


def test_curve_tells_a_fall_and_who_is_nearer_beyond_chance(tmp_path: Path) -> None:
    """Against a teacher without guidance the exact student is at least as near as the undistilled teacher.

    The student's noise is fresh at every step, so that its spread grows with the steps, and its distance falls.
    """
    report = run_evaluation(tmp_path, guidance=1.0, steps=32, samples=400, batch_size=400)
    curve = report["curve"][0]
    assert curve["falls"]
    assert [(step["from"], step["to"], step["verdict"]) for step in curve["steps"]][2] == (4, 8, "falls")
    for step in curve["steps"]:
        assert step["low"] <= step["value"] <= step["high"]
    fd = {run["name"]: run["fd"] for run in report["runs"]}
    assert curve["steps"][2]["value"] == pytest.approx(fd["student 8 steps"] / fd["student 4 steps"] - 1)
    for line in curve["rivals"]:
        difference = fd[line["rival"]] - fd[SamplingSetting("student", line["steps"]).name]
        assert line["value"] == pytest.approx(difference)
        assert line["verdict"] == (
            "nearer" if line["low"] > 0 else "farther" if line["high"] < 0 else "within the noise"
        )


def test_reference_that_cannot_be_reproduced_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_evaluation(tmp_path)
    path = tmp_path / "reference.safetensors"
    reference = Reference.load(path)
    off = replace(reference.second, features=reference.second.features + 0.1)
    replace(reference, second=off).save(path)
    with caplog.at_level(logging.WARNING):
        report = run_evaluation(tmp_path / "again", references=[path])
    assert "The stored reference differs from the pictures made here" in caplog.text
    assert not report["reference"]["stored"]


def test_teacher_alone_has_no_targets(tmp_path: Path) -> None:
    report = run_evaluation(tmp_path, student=None)
    assert len(report["runs"]) == 8
    assert report["targets"] == report["curve"] == []


@pytest.mark.parametrize(
    ("of", "met"),
    [
        # 1.05, 1.11 and 1.40 x the floor; .92, .89 and .88 of the diversity; 100, 98 and 95 %.
        ("shipped", [True, False, True, True, False, True, True, True, False]),
        ("make-demo", [True, True, True]),
    ],
)
def test_targets_are_held_against_the_floor_and_the_teacher(of: Any, met: list[bool]) -> None:
    def line(name: str, fd: float, diversity: float, accuracy: float) -> dict[str, Any]:
        return {"name": name, "fd": fd, "diversity": diversity, "prompt_accuracy": accuracy}

    records = [
        line("teacher 32 steps, guided", 2.0, 10.0, 1.0),
        line("student 1 step", 2.8, 8.8, 0.95),
        line("student 2 steps", 2.22, 8.9, 0.98),
        line("student 4 steps", 2.1, 9.21, 1.0),
    ]
    found = targets_of(records, of)
    assert [target["met"] for target in found] == met
    assert [target["value"] for target in found][:3] == pytest.approx([1.05, 1.11, 1.4])
    unknown = [{**record, "prompt_accuracy": None, "diversity": None} for record in records]
    assert [target["kind"] for target in targets_of(unknown, of)] == ["floor"] * 3


@pytest.mark.parametrize(("undistilled", "closed"), [(1.2, None), (0.9, None), (2.0, 0.8)])
def test_gap_closed_is_told_only_where_there_is_a_gap(undistilled: float, closed: float | None) -> None:
    found = Gap(4, 1.2, undistilled, 1.0).closed
    assert found == (None if closed is None else pytest.approx(closed))


def test_diversity_averages_all_pairs() -> None:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [float((features[i] - features[j]).norm()) for i, j in combinations(range(5), 2)]
    assert measures.diversity(features, ["a"] * 5) == pytest.approx(sum(pairs) / len(pairs))


def test_origin_has_every_input() -> None:
    assert set(Origin.__dataclass_fields__) >= {"teacher", "features", "prompts", "seed", "guidance", "solver"}


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random feature network that knows the tiny model's captions."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    classes = sorted(set(CAPTIONS))
    FeatureNetwork(classes, classes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of the tiny model."""
    return random_lora(tiny_model, tmp_path_factory.mktemp("lora") / "lora.safetensors")


def test_command_evaluates_a_diffusers_folder(
    tiny_model: Path, features: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, output = tmp_path / "teacher.safetensors", tmp_path / "out"
    common = ["evaluate", "--family", "sd15", "--teacher", tiny_model, "--features", features, "--reference", reference,
              "--samples", "8", "--steps", "4", "--pictures", "2", "--device", "cpu", "--output", output]  # fmt: skip
    assert main([*map(str, common), "--make-reference"]) == 0
    assert len(Reference.load(reference).second.features) == 8
    assert not output.exists()
    (lora.parent / "log.jsonl").write_text('{"update": 1, "total": 2.0}\n{"update": 2, "total": 1.0}\n')
    assert main([*map(str, common), "--lora", str(lora)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["reference"]["stored"]
    assert report["student"] == "Tiny"
    lines = {line["name"]: line for line in report["runs"]}
    assert lines["student 1 step"]["paired"] != lines["teacher 1 step"]["paired"]  # the LoRA is on for one of them
    assert all(line["prompt_accuracy"] is not None for line in report["runs"])
    assert set(report["pictures"]["prompts"]) <= set(CAPTIONS)
    assert "<h2>Training</h2>" in (output / "report.html").read_text(encoding="utf-8")
    (output / "report.html").unlink()
    assert main(["report", str(output), "--log", str(lora.parent / "log.jsonl")]) == 0
    assert (output / "report.html").is_file()
    assert "student 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "1"], "--samples must be at least 2, got 1"),
        (["--guidance", "0"], "--guidance must be at least 1, got 0.0"),
        (["--lora", "nowhere.safetensors"], "no LoRA at nowhere.safetensors"),
    ],
)
def test_command_names_the_wrong_option(
    arguments: list[str], message: str, tiny_model: Path, features: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["evaluate", "--family", "sd15", "--teacher", str(tiny_model), "--features", str(features)]
    assert main([*common, *arguments]) == 2
    assert message in capsys.readouterr().err
