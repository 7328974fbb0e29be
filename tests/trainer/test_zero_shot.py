"""Check COCO protocols: captions, framing, pictures that survive a kill, and scores against torchmetrics' own."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.evaluate.coco.captions import Caption, read_coco
from flash_diffusion.trainer.evaluate.coco.framing import for_inception, open_picture, square
from flash_diffusion.trainer.evaluate.coco.picture_folder import PictureFolder
from flash_diffusion.trainer.evaluate.coco.protocols import PROTOCOLS, CocoProtocol
from flash_diffusion.trainer.evaluate.coco.scoring import Networks, measure_folder, reference_moments
from flash_diffusion.trainer.evaluate.coco.zero_shot import (
    lora_hash,
    make_pictures,
    origin_of,
    run_folder,
)
from flash_diffusion.trainer.evaluate.command import parse_run
from flash_diffusion.trainer.evaluate.evaluator import progress_bar
from flash_diffusion.trainer.evaluate.generate import SamplingSetting
from flash_diffusion.trainer.evaluate.request import CocoOptions
from flash_diffusion.trainer.files import partial_path
from flash_diffusion.trainer.metrics.clip_score import ClipScorer
from flash_diffusion.trainer.teachers import load_teacher

from ..families.pipelines import save_pipeline
from ..forks.client import Forks
from .paints import COLOURS, Paints
from .sharing import ROOT, TRAINER, run_shared
from .stand_ins import CAPTIONS, coco_folder, inception_file, random_lora, tiny_clip

SMALL = CocoProtocol(
    "small", "annotations/captions_val2017.json", "val2017", samples=12, size=32, caption_prefix="See "
)
FLAT = [Caption(10 * index + 3, text) for index, text in enumerate([*COLOURS, *COLOURS])]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen pictures laid out as COCO is."""
    return coco_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP."""
    return tiny_clip(tmp_path_factory.mktemp("clip"))


class Eye(nn.Module):
    """In Inception's place: a few numbers a picture, none of them linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 27, generator=torch.Generator().manual_seed(0)), False)
        self.num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        cells = nn.functional.adaptive_avg_pool2d(images / 255, 3).flatten(1)
        return torch.tanh(cells @ self.weight.T)


# -- captions and pictures -------------------------------------------------------------------------------------------


def test_coco_gives_the_caption_with_the_lowest_id(coco: Path) -> None:
    found = read_coco(coco, SMALL)
    assert len(found.captions) == len(found.pictures) == 12
    for caption in found.captions:
        index = (900 - caption.number) // 7
        assert caption.text == f"{CAPTIONS[index % 6].capitalize()} no. {caption.number}."
        assert caption.picture is not None
        assert int(caption.picture.stem) == caption.number
    assert [path.name for path in found.pictures] == sorted(path.name for path in (coco / "val2017").iterdir())


def test_smaller_sample_is_the_head_of_a_larger_sample(coco: Path) -> None:
    whole, part = read_coco(coco, SMALL), read_coco(coco, SMALL, 5)
    assert part.captions == whole.captions[:5]
    assert part.pictures == whole.pictures  # the reference is all of them
    numbers = [caption.number for caption in whole.captions]
    assert numbers not in (sorted(numbers), sorted(numbers, reverse=True))


def test_captions_from_a_file_replace_cocos_captions(coco: Path) -> None:
    found = read_coco(coco, SMALL, 2, ["one", "two", "three"])
    assert found.captions == (Caption(0, "one"), Caption(1, "two"))
    with pytest.raises(UserError, match="prompts file has 3 captions"):
        read_coco(coco, SMALL, 4, ["one", "two", "three"])


def test_protocols_have_the_papers_sizes() -> None:
    five, thirty = PROTOCOLS["coco2017-5k"], PROTOCOLS["coco2014-30k"]
    assert (five.samples, five.size, five.annotations) == (5_000, 512, "annotations/captions_val2017.json")
    assert (thirty.samples, thirty.size, thirty.annotations) == (30_000, 256, "annotations/captions_val2014.json")


def break_annotations(content: Any) -> Any:
    def change(folder: Path) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / SMALL.annotations).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "annotations"), "--coco takes the folder that holds annotations/"),
        (lambda folder: shutil.rmtree(folder / "val2017"), "there is no folder .*val2017"),
        (lambda folder: (folder / "val2017" / "000000000893.jpg").unlink(), "lacks 1 of 12 pictures, such as 0{9}893"),
        (lambda folder: None, "has 12 captions to draw, small needs 13; pass --samples 12"),
        (break_annotations("{"), "is not a COCO captions file"),
        (break_annotations([]), "is not a COCO captions file"),
        (break_annotations({"images": [{"id": 1}], "annotations": []}), "KeyError: 'file_name'"),
        (
            break_annotations({"images": [], "annotations": [{"id": 1, "image_id": 5, "caption": "x"}]}),
            "1 captions are of pictures it does not list, such as 5",
        ),
        (
            break_annotations({"images": [{"id": 1, "file_name": "../../secret.jpg"}], "annotations": []}),
            "expected a file name, without a folder",
        ),
    ],
)
def test_wrong_coco_folder_raises_a_readable_error(coco: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "coco"
    shutil.copytree(coco, folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        read_coco(folder, replace(SMALL, samples=13))


# -- framing ---------------------------------------------------------------------------------------------------------


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 127 * (1 + np.sin(9 * x + 7 * y))], 2)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("shape", [(90, 60), (61, 100), (40, 40), (30, 20)])
def test_square_equals_pillows_fit(shape: tuple[int, int]) -> None:
    picture = gradient(*shape)
    side = min(shape)
    left, top = (shape[0] - side) // 2, (shape[1] - side) // 2  # Pillow's own would cut between pixels
    expected = ImageOps.fit(picture.crop((left, top, left + side, top + side)), (40, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(square(picture, 40)), np.asarray(expected))


@pytest.mark.parametrize("size", [512, 256])
def test_picture_for_inception_is_resized_without_rounding(size: int) -> None:
    picture = gradient(size, size)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    expected = nn.functional.interpolate(pixels, (299, 299), mode="bicubic", antialias=True)[0]
    seen = for_inception(picture)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-3)
    assert not torch.equal(seen, seen.round())


def test_unreadable_picture_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="half.png can't be read"):
        open_picture(tmp_path / "half.png")


# -- pictures on disk ------------------------------------------------------------------------------------------------


def make(
    folder: Path,
    captions: list[Caption] = FLAT,
    run: SamplingSetting = SamplingSetting("student", 2),  # noqa: B008
    process: int = 0,
    processes: int = 1,
    model: Paints | None = None,
    batch_size: int = 3,
) -> Paints:
    model = model or Paints(0.2)
    gallery = PictureFolder(folder, {"run": run.name}, process)
    settings = CocoOptions((run,), batch_size=batch_size)
    state = SimpleNamespace(process_index=process, num_processes=processes)
    with progress_bar(None) as progress:
        make_pictures(model, run, captions, gallery, replace(SMALL, size=4), settings, state, progress)  # type: ignore[arg-type]
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_processes_share_the_work_and_make_the_same_pictures(tmp_path: Path) -> None:
    alone = make(tmp_path / "alone")
    together = [make(tmp_path / "together", process=process, processes=2) for process in range(2)]
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "alone")) == len(FLAT) == 8
    assert sum(model.passes for model in together) == alone.passes == 2 * len(FLAT)
    assert {model.passes for model in together} == {2 * 5, 2 * 3}  # batches 0 and 2, and batch 1
    assert PictureFolder(tmp_path / "together", {"run": "student 2 steps"}).seconds_per_picture() is not None


def test_picture_depends_only_on_its_caption_and_seed(tmp_path: Path) -> None:
    make(tmp_path / "some", FLAT[2:6], batch_size=1)
    make(tmp_path / "all")
    some, whole = contents(tmp_path / "some"), contents(tmp_path / "all")
    for name, content in some.items():
        one, other = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("some", "all"))
        assert abs(one - other).max() <= 1, len(content)  # another batch: rounding alone
    assert len({*whole.values()}) == len(whole)  # the same caption twice is two pictures


def test_finished_pictures_are_kept_and_partial_files_are_replaced(tmp_path: Path) -> None:
    make(tmp_path / "whole")
    make(tmp_path / "broken")
    for caption in FLAT[4:]:
        path = PictureFolder(tmp_path / "broken", {"run": "student 2 steps"}).path(caption.number)
        partial_path(path).write_bytes(path.read_bytes()[:20])  # what a kill leaves
        path.unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*.png")}
    assert len(kept) == 4
    model = make(tmp_path / "broken")
    assert model.passes == 2 * 5  # the batches that were not whole: pictures 3-5 and 6-7
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    assert all((tmp_path / "broken" / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert not list((tmp_path / "broken").glob(".*"))


def test_folder_with_other_pictures_is_refused(tmp_path: Path) -> None:
    PictureFolder(tmp_path / "a", {"steps": 4, "teacher": "x"})
    with pytest.raises(UserError, match="steps is 4 there and 2 now; choose another --output"):
        PictureFolder(tmp_path / "a", {"steps": 2, "teacher": "x"}, process=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "000000000001.png").touch()
    with pytest.raises(UserError, match="without made_from.json"):
        PictureFolder(tmp_path / "b", {"steps": 2})


def test_nan_pictures_raise_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN or infinity instead of a picture"):
        make(tmp_path, model=Paints(float("nan")))


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "pixart_alpha", "pixart_sigma", "sd3", "sd35"])
def test_every_family_makes_pictures(family: str, tmp_path: Path) -> None:
    teacher = load_teacher(ModelSection(family=family, path=str(save_pipeline(family, tmp_path / "model"))))
    gallery = PictureFolder(tmp_path / "pictures", {})
    run = SamplingSetting("teacher", 2, 3.0)
    state = SimpleNamespace(process_index=0, num_processes=1)
    with progress_bar(None) as progress:
        make_pictures(teacher, run, FLAT[:2], gallery, SMALL, CocoOptions((run,)), state, progress)  # type: ignore[arg-type]
    made = [np.asarray(Image.open(gallery.path(caption.number))) for caption in FLAT[:2]]
    assert [picture.shape for picture in made] == [(32, 32, 3)] * 2
    assert all(picture.std() > 1 for picture in made)
    assert not np.array_equal(*made)
    origin = origin_of(teacher, run, SMALL, CocoOptions((run,)), {"teacher": "x", "student": None, "captions": "y"})
    assert origin["solver"] == ("euler" if family in ("sd3", "sd35") else "dpmpp_2m")


def test_half_precision_changes_pictures_a_little(tiny_model: Path, tmp_path: Path) -> None:
    teacher = load_teacher(ModelSection(family="sd15", path=str(tiny_model)))
    run, made = SamplingSetting("teacher", 2), []
    for precision in ("no", "bf16"):
        gallery, settings = PictureFolder(tmp_path / precision, {}), CocoOptions((run,), precision=precision)  # type: ignore[arg-type]
        state = SimpleNamespace(process_index=0, num_processes=1)
        with progress_bar(None) as progress:
            make_pictures(teacher, run, FLAT[:1], gallery, SMALL, settings, state, progress)  # type: ignore[arg-type]
        made.append(np.asarray(Image.open(gallery.path(FLAT[0].number))).astype(int))
    assert 0 < abs(made[0] - made[1]).mean() < 4


def test_runs_with_several_guidance_scales_have_their_own_folders(tmp_path: Path) -> None:
    runs = [
        SamplingSetting("teacher", 25, 7.5),
        SamplingSetting("teacher", 25, 3.0),
        SamplingSetting("teacher", 25),
        SamplingSetting("student", 1),
        SamplingSetting("student", 1, 2.0),
    ]
    assert [run_folder(tmp_path, run).name for run in runs] == [
        *("teacher-25-steps-guidance-7.5", "teacher-25-steps-guidance-3", "teacher-25-steps"),
        *("student-1-step", "student-1-step-guidance-2"),
    ]


# -- scores ----------------------------------------------------------------------------------------------------------


def tensors_of(features: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return a function with the tensor that transformers 5 puts into an output object."""

    def tensor(*inputs: Tensor) -> Tensor:
        found = features(*inputs)
        return found if isinstance(found, Tensor) else found.pooler_output

    return tensor


def test_scores_equal_torchmetrics_scores(coco: Path, clip: Path, tmp_path: Path) -> None:
    found = read_coco(coco, SMALL)
    gallery = PictureFolder(tmp_path / "pictures", {})
    random = np.random.default_rng(3)
    for caption in found.captions:
        gallery.save(caption.number, Image.fromarray(random.integers(0, 200, (32, 32, 3), dtype=np.uint8)))
    networks = Networks(Eye(), "eye", ClipScorer.load(str(clip), "cpu"))
    with progress_bar(None) as progress:
        reference = reference_moments(found, SMALL, networks, tmp_path / "coco.safetensors", progress)
        record = measure_folder(
            gallery, SamplingSetting("student", 4), found.captions, reference, SMALL, networks, progress
        )

    def view(paths: list[Path]) -> Tensor:
        return torch.stack([for_inception(square(Image.open(path).convert("RGB"), 32)) for path in paths])

    fid = FrechetInceptionDistance(feature=Eye(), normalize=True)
    files = [gallery.path(caption.number) for caption in found.captions]
    fid.update(view(list(found.pictures)), real=True)
    fid.update(view(files), real=False)
    assert record["fid"] == pytest.approx(float(fid.compute()), rel=1e-5)

    parts = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    for name in ("get_image_features", "get_text_features"):  # torchmetrics expects those of transformers 4: tensors
        setattr(parts[0], name, tensors_of(getattr(parts[0], name)))
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(clip), parts[1])
    score = CLIPScore(model_name_or_path=lambda: (parts[0], processor))
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files]
    score.update(pixels, ["See " + caption.text for caption in found.captions])
    # Its compute() would cut this random CLIP's negative score off at 0.
    assert record["clip"] == pytest.approx(float(score.score / score.n_samples) / 100, abs=1e-6)
    assert record["nfe"] == 4


def test_clip_reads_each_caption_alone_and_cuts_long_captions(clip: Path) -> None:
    scorer = ClipScorer.load(str(clip), "cpu")
    pictures = [gradient(50, 40), gradient(32, 64), gradient(20, 20)]
    texts = ["a", "a yellow star", "far too long " * 9]
    together = scorer(pictures, texts)
    alone = torch.cat([scorer([picture], [text]) for picture, text in zip(pictures, texts, strict=True)])
    torch.testing.assert_close(together, alone)
    assert together.abs().max() <= 1
    assert scorer.name.startswith(clip.name)


def test_wrong_clip_raises_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--clip: .* expected a folder or a Hub name"):
        ClipScorer.load(str(tmp_path), "cpu")


def test_coco_statistics_are_stored_and_their_origin_is_checked(
    coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "coco"
    shutil.copytree(coco, folder)
    found, stored = read_coco(folder, SMALL), tmp_path / "deep" / "coco.safetensors"
    with progress_bar(None) as progress:
        made = reference_moments(found, SMALL, Networks(Eye(), "eye", None), stored, progress)
        again = reference_moments(found, SMALL, Networks(Eye(), "eye", None), stored, progress)
        assert len(progress.tasks) == 1  # read, not made again
        torch.testing.assert_close(again.products, made.products, rtol=0, atol=0)
        with caplog.at_level(logging.WARNING):
            reference_moments(found, SMALL, Networks(Eye(), "other", None), stored, progress)
        assert "do not fit this evaluation (inception)" in caplog.text
        gradient(50, 50).save(found.pictures[3])
        changed = reference_moments(found, SMALL, Networks(Eye(), "other", None), stored, progress)
    assert not torch.equal(changed.sum, made.sum)


@pytest.mark.parametrize("content", [b"", b"no tensors here, only words that fill some bytes", None])
def test_damaged_coco_statistics_are_made_anew_and_said_so(
    content: bytes | None, coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, stored = read_coco(coco, SMALL), tmp_path / "coco.safetensors"
    with progress_bar(None) as progress:
        made = reference_moments(found, SMALL, Networks(Eye(), "eye", None), stored, progress)
        stored.write_bytes(stored.read_bytes()[:-9] if content is None else content)
        again = reference_moments(found, SMALL, Networks(Eye(), "eye", None), stored, progress)
        assert f"The statistics in {stored} can't be read" in caplog.text
        torch.testing.assert_close(again.products, made.products, rtol=0, atol=0)
        reference_moments(found, SMALL, Networks(Eye(), "eye", None), stored, progress)
    assert len(progress.tasks) == 2  # the third time they are read again


def test_missing_pictures_raise_a_readable_error(coco: Path, tmp_path: Path) -> None:
    found = read_coco(coco, SMALL)
    networks = Networks(Eye(), "eye", None)
    with progress_bar(None) as progress:
        reference = reference_moments(found, SMALL, networks, tmp_path / "coco.safetensors", progress)
        with pytest.raises(UserError, match="lacks 12 of 12 pictures; run the command again"):
            measure_folder(
                PictureFolder(tmp_path / "none", {}),
                SamplingSetting("student", 4),
                found.captions,
                reference,
                SMALL,
                networks,
                progress,
            )


def test_lora_hash_depends_on_weights_and_alpha(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    hashes = [lora_hash(tmp_path), lora_hash(tmp_path / "adapter_model.safetensors")]
    assert hashes[0] == hashes[1]
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
    hashes.append(lora_hash(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    hashes.append(lora_hash(tmp_path))
    assert len(set(hashes)) == 3
    assert lora_hash(None) is None


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("student:4", SamplingSetting("student", 4)),
        ("teacher:25:7.5", SamplingSetting("teacher", 25, 7.5)),
        ("teacher:4:1", SamplingSetting("teacher", 4)),
    ],
)
def test_run_text_is_parsed(text: str, run: SamplingSetting) -> None:
    assert parse_run(text) == run


@pytest.mark.parametrize(
    "text", ["student", "critic:4", "student:0", "student:x", "teacher:4:0.5", "teacher:4:3:2", "student:4:nan"]
)
def test_wrong_run_text_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--protocol", "coco2017-5k", "--runs", text])
    assert "is not a run; expected student:STEPS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "coco2017-5k"], "--protocol coco2017-5k needs --coco"),
        (["--coco", "x"], "--coco: these are options of a --protocol, one of coco2017-5k"),
        (
            ["--protocol", "coco2017-5k", "--coco", "x", "--runs", "student:4"],
            "names a student, but there is no --lora",
        ),
        (["--protocol", "coco2017-5k", "--coco", "nowhere"], "there is no nowhere/annotations/captions_val2017.json"),
        (["--model", "dtype=float9"], "model.dtype: input should be"),
        (["--model", "colour=red"], "model.colour: there is no such field; expected one of family, path"),
    ],
)
def test_command_names_the_wrong_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_missing_networks_stop_before_pictures_are_made(
    coco: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--protocol", "coco2017-5k", "--coco", coco, "--samples", "12", "--clip", clip, "--output", tmp_path]
    assert main(["evaluate", *map(str, arguments), "--inception", "nowhere.pth"]) == 2
    assert "there is no file nowhere.pth" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_killed_evaluation_goes_on_in_two_processes(
    trainer_forks: Forks, coco: Path, clip: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The whole command with the true Inception: killed, gone on with, and bit for bit what one run makes."""
    lora = random_lora(tiny_model, tmp_path / "lora.safetensors")
    inception = inception_file(tmp_path / "inception.pth")
    command = [
        *("evaluate", "--protocol", "coco2017-5k", "--coco", coco, "--samples", "9", "--batch-size", "2"),
        *("--family", "sd15", "--teacher", tiny_model, "--lora", lora, "--device", "cpu", "--pictures", "2"),
        *("--inception", inception, "--clip", clip),
    ]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = trainer_forks.start([*TRAINER, *command, "--runs", "student:2", "--output", broken], ROOT, together=True)
    while len(list(broken.rglob("*.png"))) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "report.json").exists()
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("*.png")}

    shared = [*command, "--runs", "student:2", "teacher:1", "--output", broken]
    text = run_shared(trainer_forks, 2, *TRAINER, *shared)
    assert text.count("report  ") == 1  # one process reports
    assert "Not the whole protocol: 9 of 5000" in text

    assert main([*map(str, command), "--runs", "student:2", "teacher:3:2.5", "--output", str(whole)]) == 0
    assert (
        len(contents(broken / "pictures" / "teacher-1-step"))
        == len(contents(whole / "pictures" / "student-2-steps"))
        == 9
    )
    assert contents(broken / "pictures" / "student-2-steps") == contents(whole / "pictures" / "student-2-steps")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())

    one, other = (json.loads((folder / "report.json").read_text()) for folder in (whole, broken))
    assert [(run["name"], run["nfe"], run["guidance"]) for run in one["runs"]] == [
        ("student 2 steps", 2, 1.0),
        ("teacher 3 steps, guidance 2.5", 6, 2.5),
    ]
    assert one["runs"][0]["fid"] == pytest.approx(other["runs"][0]["fid"], rel=1e-9)
    assert one["runs"][0]["clip"] == pytest.approx(other["runs"][0]["clip"], rel=1e-6)
    assert other["environment"]["processes"] == 2
    assert (one["student"], one["protocol"]["captions"]) == ("Tiny", 9)
    assert one["timesteps"]["student 2 steps"] == [999.0, 499.0]
    check_page(whole, runs=2)


def check_page(output: Path, runs: int) -> None:
    """The page is whole, says what matters, and is made again from the folder alone."""
    page = output / "report.html"
    first = page.read_text(encoding="utf-8")
    page.unlink()
    assert main(["report", str(output)]) == 0
    assert page.read_text(encoding="utf-8") == first
    for text in ("Tiny on COCO", "9 of 5000 captions", "Lanczos to 512 px", "student 2 steps: 999, 499"):
        assert text in first
    assert first.count("data:image/webp;base64,") == 2 * (1 + runs)  # COCO's own beside each run's
    assert first.count("<svg") == 2
