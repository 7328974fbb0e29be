"""Check evaluations of a user's own model and run: captions, features, few samples, stored references, wrong inputs."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from flash_diffusion.flash_core.lora import read_lora, write_lora
from flash_diffusion.flash_core.measures.distances import frechet_distance
from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.config import DataSection, ModelSection, parse_recipe
from flash_diffusion.trainer.demo.assets import FEATURES, LORAS
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.evaluate.coco.framing import for_inception
from flash_diffusion.trainer.evaluate.coco.picture_folder import PictureFolder
from flash_diffusion.trainer.evaluate.progress import LINE_EVERY, LineProgress, progress_bar
from flash_diffusion.trainer.evaluate.request import ModelRequest
from flash_diffusion.trainer.evaluate.teacher.captions import Captions, choose_captions, read_captions
from flash_diffusion.trainer.evaluate.teacher.reference import Reference, find_reference
from flash_diffusion.trainer.metrics.embedders import load_features, samples_needed
from flash_diffusion.trainer.metrics.inception import load_inception
from flash_diffusion.trainer.pictures import picture_bytes
from flash_diffusion.trainer.teachers import load_teacher

from .models import CAPTIONS, picture_folder, tiny_recipe
from .paints import Paints
from .stand_ins import inception_file, random_lora, tiny_clip
from .test_evaluate import run_evaluation

SMALL = ("--samples", "4", "--pictures", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def run(tiny_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distillation of the tiny model on six pictures, with a LoRA of stochasticity 0.25."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(parse_recipe(tiny_recipe(tiny_model, pictures)).to_yaml())
    lora = read_lora(random_lora(tiny_model, folder / "lora.safetensors"))
    assert lora.metadata is not None
    write_lora(folder / "lora.safetensors", lora.modules, replace(lora.metadata, stochasticity={4: 0.25, 2: 0.25}))
    return folder


def evaluate(output: Path, *arguments: str | Path) -> int:
    """Run the command on few samples."""
    return main(["evaluate", *SMALL, "--output", str(output), *map(str, arguments)])


# -- a user's own model ----------------------------------------------------------------------------------------------


def test_run_is_evaluated_with_its_own_captions_and_settings_and_without_the_demos_targets(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert evaluate(output, "--run", run) == 0
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert report["inputs"]["captions"] == f"5 captions of the run’s data, {pictures}"  # six, of which two are equal
    assert set(report["pictures"]["prompts"]) <= set(CAPTIONS)
    # The recipe's method.teacher_steps, the middle of method.guidance, method.solver; the LoRA's stochasticity.
    assert report["runs"][0]["name"] == "teacher 4 steps, guided"
    assert (report["reference"]["guidance"], report["reference"]["solver"]) == (2.25, "dpmpp_2m")
    assert report["sampling"] == {"solver": "dpmpp_2m", "stochasticity": {"2": 0.25, "4": 0.25, "8": 0.25}}
    # The demo's feature network knows no names of these pictures, and the project's targets are not this model's.
    assert {line["prompt_accuracy"] for line in report["runs"]} == {None}
    assert report["targets"] == []
    said = " ".join(capsys.readouterr().out.split())
    page = (output / "report.html").read_text(encoding="utf-8")
    for text in (said, page):
        assert "There are no targets: the project’s targets were set for the demo’s teacher." in text
        assert "has seen only the demo’s pictures" in text
        assert "4 pictures a run are too few" in text
        assert "from --samples 192 on" in text
        assert "missed" not in text.replace(".badge.missed", "")
    assert "acc." not in said
    assert f"5 captions of the run’s data, {pictures}" in page
    assert "stochasticity is 0.25 in 2 steps, 0.25 in 4 steps, 0.25 in 8 steps" in page
    ordinary = 0o666 & ~os.umask(os.umask(0o022))
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {ordinary}
    assert {"report.json", "report.html", "reference.safetensors"} <= {path.name for path in files}
    assert not [path for path in files if path.name.startswith(".")]


def test_prompts_file_wins_over_the_runs_captions_and_may_begin_with_a_byte_order_mark(
    run: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffa fox\n\n  an owl \n".encode())
    found = choose_captions(prompts, DataSection(source="demo"), ["heart"], demo=True, network="x")
    assert found == Captions(("a fox", "an owl"), f"the 2 prompts of {prompts}")


def test_demo_is_evaluated_under_its_general_captions() -> None:
    known = load_features(FEATURES).network.general
    for data in (None, DataSection(source="demo"), DataSection(source="demo-swaps")):
        found = choose_captions(None, data, known, demo=True, network="x")
        assert found == Captions(tuple(known), "the demo’s general captions")
    assert "animal face" in known


def test_captions_of_data_without_pictures_are_read(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(20)))
    assert read_captions(DataSection(source="prompts", path=prompts), 3) == ["prompt 0", "prompt 1", "prompt 2"]


def test_captions_of_a_run_need_no_readable_pictures(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures")
    (folder / "001.png").write_bytes(b"no picture")
    found = read_captions(DataSection(source="folder", path=folder), 9)
    assert set(found) <= set(CAPTIONS)
    assert {"red ball", "blue cone"} <= set(found)
    assert read_captions(DataSection(source="folder", path=folder, limit=1), 9) == ["red ball"]


# -- few samples -----------------------------------------------------------------------------------------------------


def test_samples_needed_give_the_same_bias_for_any_number_of_references() -> None:
    """Two sets of one Gaussian: |m - m_r|^2 is D (1/N + 1/M) on average, 0.5 here; the covariances' part follows it."""
    features, found = 24, []
    for times in (1, 2, 4):
        samples = samples_needed(features, times)
        assert features * (1 / samples + 1 / (times * samples)) == pytest.approx(0.5, rel=0.02)
        source = torch.Generator().manual_seed(times)
        floors = [
            frechet_distance(
                torch.randn(samples, features, generator=source),
                torch.randn(times * samples, features, generator=source),
            )
            for _ in range(12)
        ]
        found.append(np.mean(floors))
    assert max(found) < 1.15 * min(found)
    assert (samples_needed(64, 1), samples_needed(64, 2)) == (256, 192)


def test_too_few_samples_have_no_targets_and_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few, enough = (run_evaluation(tmp_path / str(samples), samples=samples) for samples in (35, 36))
    assert few["inputs"]["samples_needed"] == 36  # 12 features against twice the samples: 2 * 12 * 1.5
    assert few["targets"] == []
    assert enough["targets"] != []
    warned = "35 pictures a run are too few"
    assert [warned in " ".join(report["notes"]) for report in (few, enough)] == [True, False]
    assert caplog.text.count(warned) == 1  # before the work, too


# -- features by path ------------------------------------------------------------------------------------------------


def test_clip_by_path_gives_its_normalised_embeddings(tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    found = load_features(folder)
    embedding, scores = found.network(picture_bytes(picture)[None] / 255)
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt")["pixel_values"]
    text = AutoTokenizer.from_pretrained(folder)(["red ball"], return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(folder).eval()(text["input_ids"], pixels, text["attention_mask"])
    torch.testing.assert_close(embedding, expected.image_embeds, rtol=1e-4, atol=1e-5)
    assert scores.shape == (1, 0)
    assert (found.title, found.of_demo) == ("the CLIP clip", False)


def test_inception_by_path_gives_fids_features(tmp_path: Path) -> None:
    file = inception_file(tmp_path / "inception.pth")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((400, 400))
    embedding, _ = load_features(file).network(picture_bytes(picture)[None] / 255)
    expected = load_inception(file, "cpu")[0](for_inception(picture)[None])
    assert embedding.shape == (1, 2048)
    torch.testing.assert_close(embedding, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_evaluation_by_a_clip_names_it_and_has_no_accuracy(run: Path, tmp_path: Path) -> None:
    folder = tiny_clip(tmp_path / "clip")
    assert evaluate(tmp_path / "out", "--run", run, "--features", folder, "--steps", "1") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert (report["inputs"]["features"], report["inputs"]["dimensions"]) == ("the CLIP clip", 16)
    assert {line["prompt_accuracy"] for line in report["runs"]} == {None}
    assert not [note for note in report["notes"] if "has seen only" in note]


# -- stored references -----------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_set(path: Path) -> None:
    reference = Reference.load(path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("first.")}
    reference.save(path)
    save_file(tensors, path)


def spoil_numbers(path: Path) -> None:
    reference = Reference.load(path)
    reference.second.features[0, 0] = float("nan")
    reference.save(path)


def lose_rows(path: Path) -> None:
    reference = Reference.load(path)
    replace(reference, first=reference.first.rows(range(3))).save(path)


@pytest.mark.parametrize(
    "damage", [cut, lose_a_set, spoil_numbers, lose_rows, lambda path: path.write_bytes(b"x" * 500)]
)
def test_damaged_reference_is_made_anew_and_said_so(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_evaluation(tmp_path)
    damage(tmp_path / "reference.safetensors")
    model = Paints()
    again = run_evaluation(tmp_path, model, references=[tmp_path / "reference.safetensors"])
    assert "The reference is made anew" in caplog.text
    assert not again["reference"]["stored"]
    assert again["floor"] == whole["floor"]
    assert find_reference(
        [tmp_path / "reference.safetensors"], Reference.load(tmp_path / "reference.safetensors").origin
    )


def test_key_of_the_teacher_is_its_content(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, copy)
    section, other = (ModelSection(family="sd15", path=str(path)) for path in (tiny_model, copy))
    for fields in ((), ("dtype=float32",)):  # the folder's files, and the loaded weights
        teacher, twin = load_teacher(section), load_teacher(other)
        request, same = ModelRequest(section, fields), ModelRequest(other, fields)
        assert request._teacher_key(teacher) == same._teacher_key(twin)
    for part in (twin.pipeline.vae.decoder.conv_out.bias, next(twin.pipeline.text_encoder.parameters())):
        before = same._teacher_key(twin)
        with torch.no_grad():
            part += 1
        assert same._teacher_key(twin) != before  # not only the denoiser decides the pictures


def test_making_a_reference_overwrites_no_other_file(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    shutil.copy(run / "lora.safetensors", mine)
    before = mine.read_bytes()
    assert evaluate(tmp_path / "out", "--run", run, "--make-reference", "--reference", mine) == 2
    assert mine.read_bytes() == before


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_into_a_pipe_is_a_line_now_and_then() -> None:
    now = 0.0
    console = Console(file=io.StringIO(), get_time=lambda: now)
    progress = progress_bar(console)
    assert isinstance(progress, LineProgress)
    with progress:
        task = progress.add_task("student 4 steps", total=100, unit="passes")
        for now in (0.4 * LINE_EVERY, 1.2 * LINE_EVERY, 1.6 * LINE_EVERY, 2.4 * LINE_EVERY):  # noqa: B007
            progress.advance(task, 20)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.partition(",")[0] for line in lines] == [f"student 4 steps: {done} of 100 passes" for done in (40, 80)]
    assert all(line.endswith(" left") for line in lines)
    terminal = progress_bar(Console(file=io.StringIO(), force_terminal=True))
    assert type(terminal) is Progress
    assert progress_bar(None).disable


# -- wrong inputs ----------------------------------------------------------------------------------------------------


def test_lora_with_keys_of_no_layer_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = tmp_path / "odd.safetensors"
    tensors = load_file(run / "lora.safetensors")
    save_file({**tensors, "unet.strange.weight": torch.zeros(2), "another": torch.zeros(1)}, lora)
    assert evaluate(tmp_path / "out", "--run", run, "--lora", lora) == 2
    message = capsys.readouterr().err
    assert f"{lora}: 2 keys of the file belong to no layer" in message
    assert "unet.strange.weight" in message
    assert "another" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "{tmp}/nowhere"], ["is not the folder of a distillation (no config.yaml)"]),
        (["--run", "{tmp}"], ["is not the folder of a distillation (no config.yaml)"]),
        (["--run", "{killed}"], ["has no lora.safetensors yet", "flash-diffusion export"]),
        (["--run", "{broken}"], ["config.yaml"]),
        (["--run", "{run}", "--lora", "{demo}"], ["does not fit the model", "Choose a LoRA made for this model"]),
        (["--run", "{run}", "--prompts", "{tmp}/nowhere.txt"], ["--prompts: ", "can't be read"]),
        (["--run", "{run}", "--prompts", "{tmp}"], ["--prompts: ", "can't be read"]),
        (["--run", "{run}", "--prompts", "{empty}"], ["holds no prompts"]),
        (["--run", "{run}", "--prompts", "{latin}"], ["is not UTF-8 text"]),
        (["--run", "{run}", "--steps", "0"], ["--steps must be at least 1, got 0"]),
        (["--run", "{run}", "--guidance", "nan"], ["--guidance must be at least 1, got nan"]),
        (["--run", "{run}", "--resolution", "-64"], ["--resolution must be at least 8"]),
        (["--run", "{run}", "--device", "quantum"], ["--device: quantum can't be used here"]),
        (["--run", "{run}", "--output", "{empty}"], ["--output: ", "is a file"]),
        (["--run", "{run}", "--output", "{empty}/below"], ["--output: ", "is a file"]),
        (["--run", "{run}", "--log", "{tmp}"], ["--log: there is no file"]),
        (["--run", "{run}", "--log", "{latin}"], ["can't be read as the log of a training"]),
        (["--run", "{run}", "--log", "{torn}"], ["line 1 is not JSON"]),
        (
            ["--run", "{run}", "--inception", "{empty}"],
            ["--inception: these are options of a --protocol", "--features"],
        ),
        (["--run", "{run}", "--no-clip", "--precision", "bf16"], ["--no-clip and --precision", "--protocol"]),
        (["--run", "{run}", "--protocol", "coco2017-5k", "--coco", "{tmp}", "--vgg", "{empty}"], ["--vgg: these are"]),
        (["--run", "{run}", "--features", "{tmp}/nowhere"], ["--features: there is no network at", "expected"]),
        (["--run", "{run}", "--features", "{empty}"], ["empty.txt"]),
        (["--run", "{lost}"], ["captions of the run's data can't be read", "--prompts FILE"]),
        (["--family", "sd15", "--teacher", "{model}"], ["no captions are known for this model", "--prompts FILE"]),
    ],
)
def test_wrong_input_is_named(
    arguments: list[str],
    words: list[str],
    run: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"run": run, "tmp": tmp_path, "model": tiny_model, "demo": LORAS / "flash_demo.safetensors"}
    names |= {name: tmp_path / f"{name}.txt" for name in ("empty", "latin")}
    names["empty"].write_text("\n \n")
    names["latin"].write_bytes("café".encode("latin-1"))
    names["torn"] = tmp_path / "torn.jsonl"
    names["torn"].write_text('{"update": 1, "tot\n{"update": 2}\n')
    for name in ("killed", "broken", "lost"):
        names[name] = tmp_path / name
        names[name].mkdir()
        shutil.copy(run / "config.yaml", names[name])
    (names["broken"] / "config.yaml").write_text("model: [")
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["data"]["path"] = str(tmp_path / "moved away")
    (names["lost"] / "config.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copy(run / "lora.safetensors", names["lost"])
    shutil.copy(run / "lora.safetensors", names["broken"])
    assert evaluate(tmp_path / "out", *(argument.format(**names) for argument in arguments)) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not (tmp_path / "out" / "report.json").exists()


def test_tilde_is_the_users_home(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    shutil.copytree(run, tmp_path / "mine")
    (tmp_path / "prompts.txt").write_text("a fox")
    assert (
        main(["evaluate", *SMALL, "--steps", "1", "--run", "~/mine", "--prompts", "~/prompts.txt", "--output", "~/out"])
        == 0
    )
    assert (tmp_path / "out" / "report.html").is_file()
    assert main(["report", "~/out"]) == 0


def test_diverged_student_ends_in_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NaN or infinity instead of a picture"):
        run_evaluation(tmp_path, Paints(float("nan")))


def test_pictures_of_a_damaged_origin_are_refused(tmp_path: Path) -> None:
    PictureFolder(tmp_path, {"steps": 4})
    (tmp_path / "made_from.json").write_text('{"steps": ')
    with pytest.raises(UserError, match=r"made_from\.json is damaged .*choose another --output"):
        PictureFolder(tmp_path, {"steps": 4})
