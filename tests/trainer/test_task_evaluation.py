"""Check figures of conditional tasks against values worked by hand, and whole evaluations on tiny models."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from flash_diffusion.flash_core.lora import read_lora, write_lora
from flash_diffusion.flash_core.measures import confidence_intervals as bootstrap
from flash_diffusion.flash_core.measures.confidence_intervals import Estimate
from flash_diffusion.flash_core.measures.distances import frechet_distance
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import DataSection, TaskSection, parse_recipe
from flash_diffusion.trainer.demo.assets import LORAS
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.evaluate.command import add_arguments, request_of
from flash_diffusion.trainer.evaluate.request import Options
from flash_diffusion.trainer.evaluate.task.about import AboutTask, about_task
from flash_diffusion.trainer.evaluate.task.runs import entries_of
from flash_diffusion.trainer.evaluate.task.samples import making
from flash_diffusion.trainer.evaluate.task.samples.subjects import Subjects, batches, read_sets, read_subjects
from flash_diffusion.trainer.evaluate.task.sets import SetDistances
from flash_diffusion.trainer.evaluate.task.targets import targets_of, verdict
from flash_diffusion.trainer.metrics.embedders import Features
from flash_diffusion.trainer.report.numbers import number
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.tasks.figures import Scene
from flash_diffusion.trainer.tasks.scores import SEAM_FLOOR, cosine, distance, edge_agreement, psnr, reduced, seam

from ..families.adapters import tiny_controlnet
from ..families.networks import tiny_network
from ..families.pipelines import save_pipeline
from .models import tiny_recipe
from .stand_ins import random_lora


def colours(images: Tensor) -> Tensor:
    """Features that can be worked by hand: the mean colour."""
    return images.mean((2, 3))


def flat(*values: float, size: int = 32) -> Tensor:
    """Grey pictures (B, 3, size, size)."""
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


def square(size: int = 32, first: int = 8, last: int = 24) -> Tensor:
    """A mask (1, 1, size, size) with a square hole."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., first:last, first:last] = 1
    return mask


def line(size: int = 32, column: int = 10, rows: slice = slice(None)) -> Tensor:
    """An edge map (1, 1, size, size) with an upright line."""
    edges = torch.zeros(1, 1, size, size)
    edges[..., rows, column] = 1
    return edges


def scene(originals: Tensor, others: Tensor | None = None, **drawn: Tensor) -> Scene:
    return Scene(originals, originals if others is None else others, drawn, colours)


def task(name: str, **options: Any) -> Any:
    return build_task(TaskSection(name=name, options=options))


# -- figures ---------------------------------------------------------------------------------------------------------


def test_psnr_is_torchmetrics_own_and_ends_at_100_decibels() -> None:
    generator = torch.Generator().manual_seed(0)
    made, wanted = (torch.rand(3, 3, 8, 8, generator=generator) for _ in range(2))
    expected = peak_signal_noise_ratio(made, wanted, 1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(made, wanted).float(), expected)
    # A tenth everywhere: -20 log10(0.1).
    assert psnr(flat(0.6, 0.5), flat(0.5, 0.5)).tolist() == pytest.approx([20, 100], rel=1e-5)


def test_psnr_counts_only_the_masked_pixels() -> None:
    mask = square()
    made = torch.where(mask > 0, torch.ones(()), flat(0.6))
    assert float(psnr(made, flat(0.5), 1 - mask)) == pytest.approx(20, rel=1e-5)
    assert math.isnan(float(psnr(made, flat(0.5), torch.zeros_like(mask))))


def test_black_square_on_white_has_a_seam_and_white_square_has_none() -> None:
    white, mask = flat(1.0), square()
    assert float(seam(white, white, mask)) == pytest.approx(1)
    assert float(seam(torch.where(mask > 0, 0.0, white), white, mask)) == pytest.approx((1 + SEAM_FLOOR) / SEAM_FLOOR)
    # Half as steep, and in one of three colours.
    red = torch.where(mask > 0, torch.tensor([0.5, 1, 1]).reshape(1, 3, 1, 1), white)
    assert float(seam(red, white, mask)) == pytest.approx((0.5 / 3 + SEAM_FLOOR) / SEAM_FLOOR, rel=1e-5)


def test_seam_is_relative_to_its_surroundings() -> None:
    """On a ramp, every step is as steep as every other one; a step of twice that across the border shows."""
    ramp = (torch.arange(32) / 64).expand(1, 3, 32, 32)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    # Near the border half the pairs lie along the ramp, in columns, and half beside it, in rows of no change.
    inside = float(seam(ramp, ramp, mask))
    shifted = torch.where(mask > 0, ramp + 1 / 64, ramp)
    twice = float(seam(shifted, ramp, mask))
    assert (twice * 1.0 - inside) / inside == pytest.approx((1 / 64) / (1 / 64 + SEAM_FLOOR), rel=1e-4)
    assert math.isnan(float(seam(ramp, ramp, torch.ones(1, 1, 32, 32))))


@pytest.mark.parametrize(
    ("found", "precision", "recall"),
    [
        (line(), 1, 1),
        (line(column=12), 1, 1),  # within the tolerance
        (line(column=13), 0, 0),
        (line(rows=slice(0, 16)), 1, 18 / 32),  # half of it, and the tolerance of 2 rows
        (torch.maximum(line(), line(column=20)), 0.5, 1),
        (torch.zeros(1, 1, 32, 32), 0, 0),
    ],
)
def test_edges_agree_within_two_pixels(found: Tensor, precision: float, recall: float) -> None:
    agreement = edge_agreement(found, line())
    assert float(agreement["precision"]) == pytest.approx(precision)
    assert float(agreement["recall"]) == pytest.approx(recall)
    both = precision + recall
    assert float(agreement["f1"]) == pytest.approx(2 * precision * recall / both if both else 0)


def test_edge_agreement_is_nan_without_wanted_edges() -> None:
    agreement = edge_agreement(torch.cat([line(), line()]), torch.cat([torch.zeros(1, 1, 32, 32), line()]))
    assert torch.isnan(agreement["f1"]).tolist() == [True, False]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 3))
def test_edge_agreement_is_symmetric_and_grows_with_the_tolerance(seed: int, less: int, more: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = ((torch.rand(2, 1, 16, 16, generator=generator) < 0.1).float() for _ in range(2))
    there, back = edge_agreement(one, other, less), edge_agreement(other, one, less)
    assert torch.equal(there["precision"], back["recall"])
    wider = edge_agreement(one, other, less + more)
    assert bool((wider["f1"] >= there["f1"]).all())


def test_distance_and_cosine_by_hand() -> None:
    left, right = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [-2.0, 0.0]])
    assert distance(left, right).tolist() == [5, 3]
    assert cosine(left[1:], right[1:]).tolist() == [-1]


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_perfect_filling_scores_perfectly_and_the_rest_is_put_back() -> None:
    inpainting, mask = task("inpainting"), square()
    seen = scene(flat(0.7), mask=mask)
    perfect = inpainting.scores(flat(0.7), seen)
    assert {key: float(value) for key, value in perfect.items()} == {"features": 0, "seam": 1, "outside": 100}
    # Wrong outside of the mask alone: nothing of it is in the result, and it is said.
    outside = torch.where(mask > 0, flat(0.7), flat(0.8))
    assert torch.equal(inpainting.finished(outside, seen), flat(0.7))
    scores = inpainting.scores(outside, seen)
    assert (float(scores["features"]), float(scores["seam"])) == (0, 1)
    assert float(scores["outside"]) == pytest.approx(20, rel=1e-4)
    # Wrong under it: a quarter of the picture, in three colours.
    inside = torch.where(mask > 0, flat(0.3), flat(0.7))
    scores = inpainting.scores(inside, seen)
    assert float(scores["features"]) == pytest.approx(0.4 / 4 * math.sqrt(3), rel=1e-4)
    assert float(scores["seam"]) == pytest.approx((0.4 + SEAM_FLOOR) / SEAM_FLOOR, rel=1e-4)
    assert float(scores["outside"]) == 100


def test_every_figure_of_a_task_is_measured() -> None:
    pictures, mask = flat(0.2, 0.4), square().expand(2, -1, -1, -1)
    with_lpips = replace(
        scene(pictures, pictures.flip(0), mask=mask, edges=line().expand(2, -1, -1, -1)),
        perceptual=lambda made, wanted: (made - wanted).abs().mean((1, 2, 3)),
    )
    for name in ("inpainting", "super-resolution", "face-swap", "control"):
        kind = task(name)
        scores = kind.scores(pictures, with_lpips)
        assert set(scores) == {figure.key for figure in kind.figures}, name
        assert all(value.shape == (2,) for value in scores.values()), name


def test_detail_that_keeps_the_means_is_consistent() -> None:
    upscaling = task("super-resolution", scale=4)
    original = flat(0.5)
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 0.2 - 0.1
    scores = upscaling.scores(original + checks, scene(original))
    assert float(scores["psnr"]) == pytest.approx(20, rel=1e-4)
    assert float(scores["consistency"]) == 100
    assert float(upscaling.scores(flat(0.6), scene(original))["consistency"]) == pytest.approx(20, rel=1e-4)
    torch.testing.assert_close(reduced(original + checks, 4), flat(0.5, size=8))


def test_identity_tells_source_from_target() -> None:
    swap = task("face-swap", centre=[0.5, 0.5], radius=[0.25, 0.25])
    source, target = (torch.tensor(rgb).reshape(1, 3, 1, 1).expand(1, 3, 32, 32) for rgb in ([1.0, 0, 0], [0, 1.0, 0]))
    seen = scene(target, source, mask=square(first=6, last=26))  # all of the box around the face
    scores = {key: float(value) for key, value in swap.scores(source, seen).items()}
    assert scores["identity"] == pytest.approx(1)
    assert (scores["source"], scores["own"]) == (pytest.approx(1), pytest.approx(0))
    assert scores["outside"] == pytest.approx(-10 * math.log10(2 / 3))
    unchanged = {key: float(value) for key, value in swap.scores(target, seen).items()}
    assert (unchanged["identity"], unchanged["source"], unchanged["own"]) == pytest.approx((0, 0, 1))
    assert unchanged["outside"] == 100
    assert unchanged["seam"] == pytest.approx(1)
    between = swap.scores((source + target) / 2, seen)
    assert float(between["identity"]) == pytest.approx(0.5, rel=1e-4)


def test_face_swap_takes_its_source_from_another_picture() -> None:
    swap, generator = task("face-swap"), torch.Generator().manual_seed(0)
    images, others, beside = flat(-0.5), flat(0.5), {"identity": flat(-1.0), "mask": square()}
    drawn = swap.draw_for_evaluation(images, others, beside, generator)
    assert float(drawn["identity"].mean()) > 0
    assert torch.equal(drawn["mask"], square())
    assert float(drawn["masked"].min()) == -0.5


# -- samples ---------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_the_batch_size(pictures: Path) -> None:
    swap = task("face-swap")
    subjects = read_subjects(str(pictures), swap, 16, 0)
    assert len(subjects.samples) == 6
    whole = next(iter(batches(subjects, swap, (64, 64), 16, 3, 16)))
    parts = list(batches(subjects, swap, (64, 64), 16, 3, 5))
    for name in ("mask", "identity", "masked"):
        assert torch.equal(whole.drawn[name], torch.cat([part.drawn[name] for part in parts]))
    assert whole.seeds == tuple(seed for part in parts for seed in part.seeds)
    assert len({*whole.seeds, *whole.independent}) == 32
    assert set(whole.captions) == {""}
    # Six pictures, in the third turn: no source is its target, and none comes twice to the same.
    pairs = [(row % 6, hash(whole.others[row].numpy().tobytes())) for row in range(16)]
    assert len(set(pairs)) == 16
    assert not any(torch.equal(whole.images[row], whole.others[row]) for row in range(16))


def test_demo_pictures_have_general_captions_and_an_unseen_style() -> None:
    inpainting = task("inpainting")
    seen, unseen = (read_subjects(name, inpainting, 200, 0) for name in ("demo", "demo:noto"))
    assert "the teacher learnt from them" in seen.origin
    assert "no teacher has seen" in unseen.origin
    captions = {sample.caption for sample in seen.samples}
    assert "animal face" in captions
    assert len(captions) < 20 < len(seen.samples)
    faces = read_subjects("demo", task("face-swap"), 200, 0).samples
    assert {sample.caption for sample in faces} == {"smiley face"}
    with pytest.raises(UserError, match="no pictures of style 'oil'"):
        read_subjects("demo:oil", inpainting, 4, 0)


def test_sets_shuffle_the_demos_pictures_and_share_those_of_a_folder(pictures: Path) -> None:
    inpainting, options = task("inpainting"), Options(samples=200, seed=3, seeds=2)
    first, second = read_sets("demo", inpainting, options)
    assert [sample.name for sample in first.samples] != [sample.name for sample in second.samples]
    assert {sample.name for sample in first.samples} == {sample.name for sample in second.samples}
    assert second.fingerprint() == read_subjects("demo", inpainting, 200, 4).fingerprint()
    first, second = read_sets(str(pictures), inpainting, options)
    assert first is second


def test_origin_says_that_the_run_was_trained_on_its_pictures() -> None:
    section = DataSection(source="demo-swaps", limit=5)
    found = read_subjects(section, task("face-swap"), 4, 0)
    assert found.origin == "the first 4 pictures of demo-swaps, which the run was trained on, without captions"


@pytest.mark.parametrize("network", ["control={path: canny_t2i_adapter}", "image_adapter={path: x, image_encoder: y}"])
def test_text_to_image_refuses_control_and_image_adapters(
    network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--model", network, "--samples", "2", "--output", str(tmp_path)]
    assert main(command) != 0
    assert f"model.{network.partition('=')[0]}" in capsys.readouterr().err


def test_text_to_image_refuses_the_lora_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = LORAS / "flash_demo_face_swap.safetensors"
    assert main(["evaluate", "--lora", str(lora), "--samples", "2", "--output", str(tmp_path)]) != 0
    assert "was distilled for face-swap, not for text-to-image; choose --task face-swap" in capsys.readouterr().err


def test_option_wins_over_the_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "data")
    (tmp_path / "config.yaml").write_text(json.dumps({**recipe, "model": {"family": "sd15", "path": "there"}}))
    (tmp_path / "lora.safetensors").touch()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for options, family in (([], "sd15"), (["--family", "sdxl"], "sdxl")):
        section = request_of(parser.parse_args(["--run", str(tmp_path), *options])).model.section
        assert (section.family, section.path) == (family, "there")


# -- statistics ------------------------------------------------------------------------------------------------------


def test_bootstrap_intervals_are_those_of_the_mean() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    found = bootstrap.mean_of(values)
    width = 1.96 * float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.value - width, abs=0.2 * width)
    assert found.high == pytest.approx(found.value + width, abs=0.2 * width)
    assert found == bootstrap.mean_of(values)
    assert found == replace(bootstrap.mean_of(torch.cat([values, torch.full((3,), torch.nan)])), count=400)
    assert bootstrap.mean_of(torch.full((3,), torch.nan)) == Estimate(None, None, None, 0)
    drawn = bootstrap.set_values(lambda index: float(values[index].mean()), 400)
    of_set = bootstrap.of_set_values(drawn, 400)
    assert of_set.value == pytest.approx(found.value)
    assert of_set.low == pytest.approx(found.low, abs=0.4 * width)
    assert bootstrap.of_set_values(drawn - drawn, 400) == Estimate(0, 0, 0, 400)


def test_intervals_of_several_sets_do_not_narrow_by_rows_that_move_together() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, generator=generator, dtype=torch.float64)
    alone, again = bootstrap.mean_of(rows), bootstrap.mean_over_sets([rows, rows + 1])
    assert again.value == pytest.approx((alone.value or 0) + 0.5)
    assert (again.low, again.high) == pytest.approx(((alone.low or 0) + 0.5, (alone.high or 0) + 0.5))
    assert again.count == 400
    other = torch.randn(200, generator=generator, dtype=torch.float64)
    both = bootstrap.mean_over_sets([rows, other])
    width, single = ((each.high or 0) - (each.low or 0) for each in (both, alone))
    assert width == pytest.approx(single / math.sqrt(2), rel=0.2)
    assert bootstrap.mean_over_sets([rows]) == alone
    # The mean over sets of their means, also where a set has fewer values that count.
    few = torch.full((200,), torch.nan)
    few[:50] = 3
    assert bootstrap.mean_over_sets([torch.ones(200), few]).value == 2
    assert bootstrap.mean_over_sets([few[100:], few[100:]]) == Estimate(None, None, None, 0)


def test_a_reference_guided_in_an_interval_replaces_the_run_of_its_name() -> None:
    options = Options(steps=4, guidance=3.0, interval=(250, 750))
    entries = entries_of(task("inpainting"), options, student=False)
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    guided = next(entry.run for entry in entries if entry.name == "teacher 4 steps, guided")
    assert guided is not None
    assert guided.interval == (250, 750)


def test_task_targets_are_set_distances_over_the_teachers_own_and_clear_differences() -> None:
    many = "teacher 32 steps, guided"
    values = {many: 2.0, "student 4 steps": 2.1, "student 2 steps": 2.4, "student 1 step": 2.8}
    estimates = {name: {"fd": Estimate(value, 0, 9, 64)} for name, value in values.items()}
    comparisons = [
        {"figure": "fd", "run": f"student {steps}", "rival": f"teacher {steps}", "verdict": told}
        for steps, told in (("2 steps", "better"), ("1 step", "even"))
    ]
    found = targets_of(estimates, comparisons, many)
    assert [(line["kind"], line["run"], line["met"]) for line in found] == [
        ("within", "student 4 steps", True),  # 1.05 of 1.05
        ("within", "student 2 steps", False),  # 1.2 of 1.15
        ("within", "student 1 step", True),  # 1.4 of 1.4
        ("better", "student 2 steps", True),
        ("better", "student 1 step", False),
    ]
    assert [line["value"] for line in found[:3]] == pytest.approx([1.05, 1.2, 1.4])
    assert targets_of({name: {} for name in values}, comparisons, many) == []  # too few samples for sets
    sides = [
        verdict(Estimate(0.1, low, high, 9)) for low, high in ((0.01, 0.2), (-0.1, 0.2), (-0.3, -0.1), (None, None))
    ]
    assert sides == ["better", "even", "worse", "even"]


def test_set_distances_are_those_of_the_features_and_know_the_nearer_run() -> None:
    generator = torch.Generator().manual_seed(0)

    def made(shift: float) -> dict[str, Tensor]:
        values = torch.randn(128, 3, generator=generator) + shift
        return {"features": values, "states": 5 * values, "random": values[:, :2]}

    independent, runs = made(0), {"many": made(0), "near": made(0.2), "far": made(1.0)}
    sets = SetDistances.measured(runs, independent, made(1.0)["features"])
    for name, kinds in runs.items():
        expected = frechet_distance(kinds["features"], independent["features"])
        assert sets.of(name, "fd").value == pytest.approx(expected)
    for key in ("fd", "fd_states", "fd_random"):
        assert verdict(sets.difference("near", "far", key)) == "better"
        assert verdict(sets.difference("far", "near", key)) == "worse"
        assert sets.difference("near", "near", key) == Estimate(0, 0, 0, 128)
    # Whitened features have the unit of no network: five times the features are the same picture.
    plain = {
        name: {**kinds, "states": kinds["features"]} for name, kinds in {"far": runs["far"], "": independent}.items()
    }
    same = SetDistances.measured({"far": plain["far"]}, plain[""], runs["far"]["features"])
    assert sets.of("far", "fd_states").value == pytest.approx(same.of("far", "fd_states").value, rel=1e-3)
    to_originals = [sets.of(name, "fd_originals").value or 0 for name in ("far", "near")]  # the originals are far, too
    assert to_originals[0] < to_originals[1] / 2


def test_means_over_sets_have_the_interval_of_independent_figures() -> None:
    generator = torch.Generator().manual_seed(0)

    def measured() -> SetDistances:
        kinds = [torch.randn(128, 3, generator=generator) + shift for shift in (0.4, 0.0)]
        run, independent = ({"features": values, "states": values, "random": values} for values in kinds)
        return SetDistances.measured({"run": run, "twin": run}, independent, kinds[1])

    sets = [measured() for _ in range(4)]
    one, mean = [each.of("run", "fd") for each in sets], SetDistances.mean(sets).of("run", "fd")
    assert mean.value == pytest.approx(sum(each.value or 0 for each in one) / 4)
    assert mean.count == 4 * 128
    squares = [((each.high or 0) - (each.value or 0)) ** 2 for each in one]
    # Variances of independent figures add up; a standard deviation of 60 halves is known to 9 %.
    assert (mean.high or 0) - mean.value == pytest.approx(math.sqrt(sum(squares)) / 4, rel=0.3)
    assert SetDistances.mean(sets).difference("run", "twin", "fd") == Estimate(0, 0, 0, 512)
    assert SetDistances.mean(sets[:1]).of("run", "fd") == one[0]


@pytest.mark.parametrize(
    ("of_demo", "is_demo", "pictures_of_demo", "targets", "warned"),
    [
        (True, True, True, True, False),
        (True, False, True, False, False),  # a user's model on the demo's pictures
        (True, True, False, False, True),  # the demo's feature network on other pictures
        (False, False, False, False, False),  # --features CLIP
    ],
)
def test_targets_are_the_demos_own(
    of_demo: bool, is_demo: bool, pictures_of_demo: bool, targets: bool, warned: bool
) -> None:
    about = about_task(Features(None, "a network", "", of_demo), is_demo, Subjects((), "", pictures_of_demo))
    assert about.has_targets == targets
    assert any("There are no targets" in note for note in about.notes) != targets
    assert any("a network, which has seen only the demo’s pictures" in note for note in about.notes) == warned


# -- the command -----------------------------------------------------------------------------------------------------

CHANNELS = {"inpainting": 9, "super-resolution": 8, "face-swap": 13, "control": 4}


@pytest.fixture(scope="module")
def lora(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of the tiny model, for text alone."""
    return random_lora(tiny_model, tmp_path_factory.mktemp("loras") / "text.safetensors")


def for_task(lora: Path, name: str, path: Path) -> Path:
    """The same LoRA, distilled for a task."""
    file = read_lora(lora)
    assert file.metadata is not None
    write_lora(path, file.modules, replace(file.metadata, task=name, teacher_hash="", title=f"Tiny {name}"))
    return path


def wide_model(folder: Path, channels: int) -> Path:
    """The tiny Stable Diffusion with further input channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = {key: value for key, value in tiny_network("sd15").config.items() if not key.startswith("_")}
        network = UNet2DConditionModel(**{**fields, "in_channels": channels})
    return save_pipeline("sd15", folder, unet=network.eval())


@pytest.mark.parametrize("name", list(CHANNELS))
def test_each_task_is_evaluated(name: str, lora: Path, pictures: Path, tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model", CHANNELS[name])
    student = for_task(lora, name, tmp_path / "lora.safetensors")
    command = ["evaluate", "--task", name, "--family", "sd15", "--teacher", str(model), "--lora", str(student)]
    command += ["--data", str(pictures), "--samples", "7", "--steps", "4", "--pictures", "2", "--batch-size", "3"]
    if name == "control":
        tiny_controlnet(UNet2DConditionModel.from_pretrained(model / "unet")).save_pretrained(tmp_path / "control")
        command[3:3] = ["--model", f"control={{path: {tmp_path / 'control'}}}"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["task"], report["student"]) == (name, f"Tiny {name}")
    keys = [figure["key"] for figure in report["figures"]]
    wanted = [figure.key for figure in task(name).figures if figure.key != "lpips"] + ["paired"]
    assert keys == wanted  # seven samples are too few for a distance of sets
    assert any("7 samples are too few for 64" in note for note in report["notes"])
    assert any("usable from --samples 32 on" in note for note in report["notes"])
    runs = {run["name"]: run for run in report["runs"]}
    assert [run["nfe"] for run in report["runs"]] == [0, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4] + [8] * (name == "control")
    assert all(0 < run["figures"][key]["count"] <= 7 for run in runs.values() for key in keys)
    # The project's targets are the demo's; a user's own model has none, and the report says what measured it.
    assert report["targets"] == []
    assert [note for note in report["notes"] if "There are no targets" in note]
    assert [note for note in report["notes"] if "has seen only the demo’s pictures" in note]
    assert runs["teacher 4 steps, guided"]["figures"]["paired"]["value"] == 0  # which are the many steps here
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(figure["title"] in page for figure in report["figures"])
    files = [
        *report["pictures"]["original"],
        *(file for drawn in report["pictures"]["drawn"].values() for file in drawn),
    ]
    assert page.count("<img") == 2 * (len(report["pictures"]["drawn"]) + 1 + 1 + 4 + 1 + (name == "control"))
    assert all((tmp_path / "out" / file).is_file() for file in files)
    # The same again, in other batches.
    if name != "inpainting":
        return
    assert main([*command[:-1], "7", "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    for key in keys:
        first, second = (line["runs"][2]["figures"][key]["value"] for line in (report, again))
        assert first == pytest.approx(second, rel=1e-3)


def test_enough_samples_give_frechet_distances(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(  # 256 would take minutes
        "flash_diffusion.trainer.evaluate.task_comparison.samples_needed", lambda features: features
    )
    model = wide_model(tmp_path / "model", 9)
    command = ["evaluate", "--task", "inpainting", "--family", "sd15", "--teacher", str(model), "--steps", "1"]
    command += ["--data", str(pictures), "--samples", "66", "--batch-size", "33", "--guidance", "1"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [figure["key"] for figure in report["figures"]][:4] == ["fd", "fd_states", "fd_random", "fd_originals"]
    originals, many = report["runs"][:2]
    assert originals["figures"]["fd_originals"]["value"] == pytest.approx(0, abs=1e-4)
    assert 0 < many["figures"]["fd"]["value"] < originals["figures"]["fd"]["value"]
    assert report["targets"] == []  # there is no student


def test_stored_answers_of_the_teacher_give_the_same_report(
    lora: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = "flash_diffusion.trainer.evaluate.task_comparison"
    monkeypatch.setattr(f"{comparison}.samples_needed", lambda features: 4)
    model, reference = wide_model(tmp_path / "model", 9), tmp_path / "answers.safetensors"
    student = for_task(lora, "inpainting", tmp_path / "lora.safetensors")
    command = ["evaluate", "--task", "inpainting", "--family", "sd15", "--teacher", str(model), "--data", str(pictures)]
    command += ["--steps", "2", "--samples", "5", "--pictures", "2", "--lora", str(student)]
    reports = []
    drawn: list[str] = []
    sample = making.sample_latents
    monkeypatch.setattr(
        making, "sample_latents", lambda rows, run, *rest: drawn.append(run.name) or sample(rows, run, *rest)
    )
    for name, options in (("plain", []), ("first", ["--reference", str(reference)])) * 2:
        drawn.clear()
        assert main([*command, *options, "--output", str(tmp_path / name)]) == 0
        reports.append((json.loads((tmp_path / name / "report.json").read_text()), list(drawn)))
    (plain, _), (first, whole), _, (stored, rest) = reports
    assert [run["figures"] for run in stored["runs"]] == [run["figures"] for run in first["runs"]]
    assert [run["figures"] for run in plain["runs"]] == [run["figures"] for run in first["runs"]]
    for one, two in zip(sorted((tmp_path / "plain").rglob("*.webp")), sorted((tmp_path / "first").rglob("*.webp")),
                        strict=True):  # fmt: skip
        assert one.read_bytes() == two.read_bytes()
    assert any(name.startswith("teacher 2") for name in whole)
    assert {name for name in rest if not name.startswith("student")} == {"teacher 1 step"}  # the first call, unused
    assert any("come from" in note for note in stored["notes"])
    assert not any("come from" in note and "earlier evaluation" in note for note in first["notes"])
    capsys.readouterr()
    # Another teacher, other samples, a damaged file: said in words, never used.
    other = for_task(lora, "inpainting", tmp_path / "again.safetensors")
    assert main([*command, "--reference", str(reference), "--lora", str(other), "--output", str(tmp_path / "x")]) == 0
    wrong = [*command, "--reference", str(reference), "--output", str(tmp_path / "y")]
    assert main([*wrong, "--seed", "1"]) == 2
    assert "seed is 0 there and 1 now" in capsys.readouterr().err
    picture = next(path for path in sorted(pictures.iterdir()) if path.suffix == ".png")
    picture_bytes = picture.read_bytes()
    Image.open(picture).rotate(90).save(picture)
    assert main(wrong) == 2
    assert "subjects is" in capsys.readouterr().err
    picture.write_bytes(picture_bytes)
    reference.write_bytes(reference.read_bytes()[:-100])
    assert main(wrong) == 2
    assert "holds no readable answers" in capsys.readouterr().err


def test_figures_of_several_sets_are_the_means_of_each_sets_own(
    lora: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_diffusion.trainer.evaluate.task_comparison.samples_needed", lambda features: 4)
    model, student = wide_model(tmp_path / "model", 9), for_task(lora, "inpainting", tmp_path / "lora.safetensors")
    command = ["evaluate", "--task", "inpainting", "--family", "sd15", "--teacher", str(model), "--data", str(pictures)]
    command += ["--steps", "2", "--samples", "6", "--pictures", "2", "--lora", str(student)]
    references = [tmp_path / "answers.safetensors", tmp_path / "answers.seed1.safetensors"]
    reports = []
    for name, options in (
        ("0", []),
        ("1", ["--seed", "1"]),
        ("both", ["--seeds", "2", "--reference", str(references[0])]),  # makes two files
        ("1 stored", ["--seed", "1", "--reference", str(references[1])]),
        ("partly", ["--seeds", "2", "--reference", str(references[0])]),
    ):
        if name == "partly":
            references[0].unlink()
        assert main([*command, *options, "--output", str(tmp_path / name)]) == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    *alone, both, stored, partly = reports
    assert [run["figures"] for run in stored["runs"]] == [run["figures"] for run in alone[1]["runs"]]
    assert [run["figures"] for run in partly["runs"]] == [run["figures"] for run in both["runs"]]
    notes = [next((note for note in report["notes"] if "earlier evaluation" in note), "") for report in reports]
    assert [[str(path) in note for path in references] for note in notes] == [
        [False, False], [False, False], [False, False], [False, True], [False, True]
    ]  # fmt: skip
    assert both["pictures"] == alone[0]["pictures"]
    for row, run in enumerate(both["runs"]):
        for key, figure in run["figures"].items():
            single = [report["runs"][row]["figures"][key]["value"] for report in alone]
            assert run["seeds"]["values"][key] == pytest.approx(single, rel=1e-4, abs=1e-6)
            assert figure["value"] == pytest.approx(sum(single) / 2, rel=1e-4, abs=1e-6)
            spread = abs(single[0] - single[1]) / math.sqrt(2)
            assert run["seeds"]["deviations"][key] == pytest.approx(spread, rel=1e-3, abs=1e-5)
    assert both["runs"][2]["seeds"]["deviations"]["fd"] > 0  # other samples, other figures
    assert alone[0]["runs"][2]["seeds"]["deviations"] == {}
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    fd = both["runs"][2]["figures"]["fd"]
    spread = both["runs"][2]["seeds"]["deviations"]["fd"]
    assert f"{number(fd['low'])} … {number(fd['high'])}; ± {number(spread)}" in page
    assert "2 sets of 6 samples per run" in page
    assert "of seeds 0 to 1" in page
    assert "±" not in (tmp_path / "0" / "report.html").read_text(encoding="utf-8")


def test_run_folder_names_model_task_and_options(lora: Path, pictures: Path, tmp_path: Path) -> None:
    model, run = wide_model(tmp_path / "model", 8), tmp_path / "run"
    run.mkdir()
    recipe = tiny_recipe(model, pictures, task={"name": "super-resolution", "options": {"scale": 2, "jpeg": None}})
    (run / "config.yaml").write_text(parse_recipe(recipe).to_yaml())
    command = ["evaluate", "--run", str(run), "--samples", "2", "--steps", "1", "--output", str(tmp_path / "out")]
    assert main(command) == 2  # no LoRA yet
    for_task(lora, "super-resolution", run / "lora.safetensors")
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["task"] == "super-resolution"
    assert (report["origin"]["task_options"]["scale"], report["origin"]["task_options"]["jpeg"]) == (2, None)
    assert str(pictures) in report["origin"]["data"]


def test_targets_need_enough_samples(
    lora: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = "flash_diffusion.trainer.evaluate.task_comparison"
    monkeypatch.setattr(f"{comparison}.about_task", lambda *inputs: AboutTask())  # as for the demo
    monkeypatch.setattr(f"{comparison}.FEWEST_SAMPLES", 3)
    monkeypatch.setattr(f"{comparison}.samples_needed", lambda features: 4)
    student = for_task(lora, "super-resolution", tmp_path / "lora.safetensors")
    command = ["evaluate", "--task", "super-resolution", "--family", "sd15", "--data", str(pictures), "--steps", "2"]
    command += ["--teacher", str(wide_model(tmp_path / "model", 8)), "--lora", str(student), "--output", str(tmp_path)]
    held = []
    for samples in ("2", "4"):
        assert main([*command, "--samples", samples]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        held.append([(target["figure"], target["kind"], target["run"]) for target in report["targets"]])
        assert any("samples are too few: the intervals" in note for note in report["notes"]) == (samples == "2")
    runs = ("student 4 steps", "student 2 steps", "student 1 step")
    assert held == [[], [("fd", "within", run) for run in runs] + [("fd", "better", run) for run in runs[1:]]]
    assert all(run["figures"]["fd_states"]["value"] >= 0 for run in report["runs"])
    pairs = dict.fromkeys((line["run"], line["rival"]) for line in report["comparisons"])
    assert list(pairs)[:2] == [("student 1 step", "teacher 1 step"), ("student 2 steps", "teacher 2 steps")]
    assert ("student 8 steps", "teacher 4 steps, guided") in pairs
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "student 2 steps against teacher 1 step, guided" in page
    for curve, key in zip(report["curve"], ("fd", "fd_states", "fd_random"), strict=True):
        fd = {run["name"]: run["figures"][key]["value"] for run in report["runs"]}
        change = fd["student 8 steps"] / fd["student 4 steps"] - 1
        assert curve["steps"][2]["value"] == pytest.approx(change)
        steps = [fd[f"student {count}"] for count in ("1 step", "2 steps", "4 steps", "8 steps")]
        assert curve["falls"] == (sorted(steps, reverse=True) == steps)
        assert f"In {report['kinds'][curve['kind']]}: distance falls with every step: " in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task", "outfit"], ["no task 'outfit'", "inpainting"]),
        (["--task", "inpainting", "--task-options", '{"holes": 1}'], ["task.options.holes", "masks"]),
        (["--task", "inpainting", "--prompts", "x.txt"], ["--prompts", "text-to-image"]),
        (["--task", "inpainting", "--targets", "make-demo"], ["--targets", "text-to-image"]),
        (["--data", "demo"], ["--data", "--task"]),
        (["--task", "inpainting", "--protocol", "coco2017-5k", "--coco", "x"], ["--protocol", "inpainting"]),
        (["--task", "super-resolution", "--model", "task_adapter=inpainting"], ["made for inpainting"]),
        (["--task", "inpainting", "--samples", "1"], ["--samples must be at least 2"]),
        (["--task", "control"], ["model.control", "ControlNet"]),
        (["--run", "nowhere"], ["config.yaml"]),
    ],
)
def test_command_names_options_that_do_not_fit(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--output", str(tmp_path), *options]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_lora_or_model_of_another_task_is_refused(
    tiny_model: Path, lora: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = for_task(lora, "face-swap", tmp_path / "other.safetensors")
    command = ["evaluate", "--task", "inpainting", "--family", "sd15", "--data", str(pictures), "--samples", "2"]
    command += ["--output", str(tmp_path / "out"), "--lora"]
    assert main([*command, str(lora), "--teacher", str(tiny_model)]) == 2
    assert "needs a model that reads 9 channels" in capsys.readouterr().err
    assert main([*command, str(other), "--teacher", str(wide_model(tmp_path / "model", 9))]) == 2
    assert "distilled for face-swap, not for inpainting" in capsys.readouterr().err
