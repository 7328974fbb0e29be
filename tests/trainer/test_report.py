"""Check the report's page: complete, self-contained, with missed targets, and charts to scale."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flash_diffusion.trainer.cli import main
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.evaluate.curve import curves_of
from flash_diffusion.trainer.evaluate.evaluator import save_pictures
from flash_diffusion.trainer.evaluate.generate import SamplingSetting
from flash_diffusion.trainer.evaluate.teacher.figures import KINDS, Figures
from flash_diffusion.trainer.evaluate.teacher.reference import FeatureSet, Origin, Reference
from flash_diffusion.trainer.evaluate.teacher.targets import gaps_of, targets_of
from flash_diffusion.trainer.evaluate.teacher_comparison import few_step_runs
from flash_diffusion.trainer.report.build import (
    finding_lines,
    print_report,
    read_page,
    read_report,
    target_lines,
    terminal_table,
    write_report,
)
from flash_diffusion.trainer.report.charts import (
    Axis,
    Line,
    curve_chart,
    passes_chart,
    read_log,
    running_mean,
    thinned,
    training_charts,
)
from flash_diffusion.trainer.report.coco_page import comparability, score_table
from flash_diffusion.trainer.report.numbers import listed, number, seconds, share, signed
from flash_diffusion.trainer.report.teacher.tables import run_groups, run_table

PROMPTS = ["a <red> heart", "grapes"]
FD = {"student 8 steps": 0.25, "student 4 steps": 0.21, "student 2 steps": 0.3, "student 1 step": 0.27,
      "teacher 32 steps, guided": 0.2}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An evaluation's output: figures worked by hand, pictures of one colour each."""
    runs = [
        SamplingSetting("teacher", 32, 3.0),
        *(SamplingSetting("student", steps) for steps in (1, 2, 4, 8)),
        *few_step_runs(3.0),
    ]
    records, files = [], {}
    for index, run in enumerate(runs):
        fd = FD.get(run.name, 8.0 / run.steps)
        scores = {"fd": fd, "kid": fd / 100, "paired": index / 10, "prompt_accuracy": 0.986, "diversity": 1.5}
        facts = {"name": run.name, "steps": run.steps, "guidance": run.guidance, "nfe": run.nfe}
        records.append(facts | scores | {"seconds_per_image": run.nfe / 100})
        files[run.name] = save_pictures(torch.full((2, 3, 8, 8), index / 10), tmp_path, run.name)
    gaps = gaps_of(records)
    report = {
        "kind": "teacher",
        "floor": {"fd": 0.2, "kid": 0.002},
        "runs": records,
        "targets": targets_of(records),
        "gaps": [{**asdict(gap), "closed": gap.closed, "times_closer": gap.times_closer} for gap in gaps],
        "notes": [],
        "student": "tiny",
        "reference": {"samples": 256, "times": 2, "distinct_prompts": 128, "stored": True},
        "settings": {"samples": 256},
        "environment": {"device": "cpu", "threads": 1},
        "pictures": {"prompts": PROMPTS, "files": files},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


class Page(HTMLParser):
    """What a browser would fetch, and the balance of the tags."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_page_is_whole_and_fetches_nothing(folder: Path) -> None:
    page = Page((write_report(folder)).read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.addresses) == 2 * 9
    assert all(address.startswith("data:image/webp;base64,") for address in page.addresses)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert not re.search(r"url\(|<script|<link", text)
    assert "prefers-color-scheme: dark" in text


def test_page_and_terminal_say_which_targets_were_met(folder: Path) -> None:
    # 0.21, 0.3 and 0.27 against a floor of 0.2; diversity as the teacher's; accuracy 98.6 % against 99, 98 and 96 %.
    text = (write_report(folder)).read_text(encoding="utf-8")
    page = Page(text)
    assert "7 of 9 targets met" in page.texts
    assert [page.texts.count(verdict) for verdict in ("✓ met", "✗ missed")] == [7, 2]
    for value in ("1.05 ×", "1.50 ×", "1.35 ×", "1.00 ×", "98.6 %"):
        assert value in page.texts
    assert "64 passes become 1, 2, 4 or 8" in page.texts
    lines = target_lines(read_page(folder))
    assert lines[0] == "met: student 4 steps, 1.05 times the floor (target: at most 1.05 ×)"
    assert lines[1] == "missed: student 2 steps, 1.50 times the floor (target: at most 1.1 ×)"
    assert lines[6] == (
        "missed: student 4 steps, 98.6 % of the pictures show what their prompt names (target: at least 99 %)"
    )


@pytest.fixture
def measured(folder: Path) -> Path:
    """An evaluation with figures in three kinds of features: students at 1.5, .6, .1 and .3 from the teacher."""
    generator = torch.Generator().manual_seed(0)

    def made(shift: float) -> FeatureSet:
        values = torch.randn(64, 4, generator=generator) + shift
        looks = torch.rand(64, 2, generator=generator) + 0.5
        more = {"states": values[:, :3] * 2, "random": values.flip(1), "looks": looks, "preference": values[:, 0]}
        return FeatureSet(values, torch.zeros(64, dtype=torch.int64), more)

    origin = Origin("t", "f", "p", 64, 2, 0, 32, 3.0, "euler")
    twice = [made(0), made(0)]
    first = FeatureSet(
        torch.cat([each.features for each in twice]),
        torch.cat([each.predicted for each in twice]),
        {name: torch.cat([each.more[name] for each in twice]) for name in twice[0].more},
    )
    reference = Reference.of(origin, first, made(0), {})
    prompts = [f"thing {index // 2}" for index in range(64)]
    figures = Figures(reference, "teacher 32 steps, guided", prompts, [{0}] * 64, scored=True)
    report = json.loads((folder / "report.json").read_text())
    shifts = {1: 1.5, 2: 0.6, 4: 0.1, 8: 0.3}
    for run in report["runs"]:
        if run["name"] == "teacher 32 steps, guided":
            sets = [reference.second]
        elif run["name"].startswith("student"):
            sets = [made(shifts[run["steps"]]).whitened(reference.whitenings) for _ in range(2)]
        else:
            sets = [made(2.0 if run["steps"] < 8 else 0.3).whitened(reference.whitenings)]
        run.update(figures.of(run["name"], sets))
    report |= {
        "curve": curves_of(figures, {kind: kind for kind in KINDS}),
        "kinds": {"features": "an eye", "states": "the teacher’s hidden states", "random": "random features"},
        "preference": "PickScore (tiny)",
        "settings": {"samples": 64, "seeds": 2},
    }
    (folder / "report.json").write_text(json.dumps(report, allow_nan=False))
    return folder


def test_page_and_terminal_tell_the_curve_in_words(measured: Path) -> None:
    page = read_page(measured)
    lines = finding_lines(page)
    assert len(lines) == 2 * len(KINDS)
    assert lines[0].startswith("In an eye: distance falls with every step: no, 4 -> 8 rises by ")
    assert "; 1 -> 2 falls by " in lines[0]
    assert lines[1].startswith("In an eye: the student is at 1, 2 and 4 steps nearer to the teacher than the")
    assert lines[1].endswith("; at 8 steps as far as the undistilled teacher, within the noise.")
    text = Page(write_report(measured).read_text(encoding="utf-8"))
    assert text.open == []
    assert lines[0].replace("->", "→") in text.texts
    for head in ("Precision ↑", "Preference ↑", "Sharpness"):
        assert head in text.texts
    stream = io.StringIO()
    print_report(measured, measured / "report.html", Console(file=stream, width=400))
    assert "Quality; sharpness and contrast: 1 = the teacher's" in stream.getvalue()
    assert all(line in stream.getvalue() for line in lines)


def test_seeds_are_told_as_their_standard_deviation(measured: Path) -> None:
    report = json.loads((measured / "report.json").read_text())
    student, teacher = report["runs"][1], report["runs"][-1]
    assert student["seeds"]["count"] == 2
    assert student["seeds"]["deviations"]["fd"] > 0
    assert teacher["seeds"] == {"count": 1, "deviations": {}}
    cells = {column.short: column for column in run_table(report).columns}
    assert cells["FD"].of(student).below.startswith("± ")
    assert " … " in cells["FD"].of(teacher).below


def test_terminal_text_is_encodable_in_cp1252(folder: Path, scores: Path) -> None:
    for output in (folder, scores):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        print_report(output, write_report(output), Console(file=stream, width=200))
        stream.flush()


def test_report_of_version_0_1_opens(folder: Path) -> None:
    """Reports of version 0.1 have no kind, no gaps and no notes; their targets are in times and have no kind."""
    report = json.loads((folder / "report.json").read_text())
    measure = "times closer than teacher 4 steps without guidance"
    target = {
        "run": "student 4 steps",
        "measure": measure,
        "value": 1.3284,
        "at_least": 5.0,
        "perfect": 1.9,
        "met": False,
    }
    old = {key: value for key, value in report.items() if key not in ("kind", "gaps", "notes")} | {"targets": [target]}
    (folder / "report.json").write_text(json.dumps(old))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.open == []
    assert "0 of 1 targets met" in page.texts
    assert "student 4 steps: times closer than teacher 4 steps without guidance" in page.texts
    assert "Gap" not in page.texts


def test_zero_shot_report_of_version_0_1_opens(scores: Path) -> None:
    report = json.loads((scores / "report.json").read_text())
    assert "notes" not in report
    report["protocol"]["captions"] = 100
    (scores / "report.json").write_text(json.dumps(report))
    assert any("100 of 5000 captions" in part for part in Page(write_report(scores).read_text(encoding="utf-8")).texts)


def test_report_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"kind": "speed", "runs": []}))
    with pytest.raises(UserError, match="is not a report that this version reads; .* teacher, task, zero-shot"):
        read_report(tmp_path)


def test_broken_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"runs": [')
    with pytest.raises(UserError, match=r"report\.json is not JSON"):
        read_report(tmp_path)


def rename_a_figure(report: dict) -> None:
    report["runs"][1]["frechet"] = report["runs"][1].pop("fd")


def spoil_a_number(report: dict) -> None:
    report["runs"][1]["fd"] = "near"


@pytest.mark.parametrize(
    "damage",
    [
        rename_a_figure,
        spoil_a_number,
        lambda report: report.pop("floor"),
        lambda report: report["runs"].clear(),
    ],
)
def test_damaged_report_raises_a_readable_error(
    damage: Callable[[dict], object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((folder / "report.json").read_text())
    damage(report)
    (folder / "report.json").write_text(json.dumps(report))
    assert main(["report", str(folder)]) == 2
    assert "report.json is damaged: an entry is missing or has another form" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no report.json; make one with `flash-diffusion evaluate"),
        (b"[1]", "is not a report that this version reads"),
        (b"\xff\xfe\x00", "is not JSON"),
    ],
)
def test_wrong_report_is_named(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_missing_files_of_a_report_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "report.json")]) == 2
    assert "is a file; give the folder" in capsys.readouterr().err
    assert main(["report", str(folder), "--log", str(folder / "nowhere.jsonl")]) == 2
    assert "--log: there is no file" in capsys.readouterr().err
    picture = folder / "pictures" / "student-4-steps" / "00.webp"
    picture.write_bytes(picture.read_bytes()[:20])
    assert main(["report", str(folder)]) == 2
    assert f"{picture}, a picture of the report, can't be read" in capsys.readouterr().err
    picture.unlink()
    assert main(["report", str(folder)]) == 2
    assert f"{picture}, a picture of the report, can't be read" in capsys.readouterr().err


def test_page_tells_captions_features_and_samplers(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["inputs"] = {
        "captions": "5 captions of the run’s data, <here>",
        "features": "the CLIP big",
        "dimensions": 768,
        "samples_needed": 2304,
        "known_prompts": 64,
    }
    report["sampling"] = {"solver": "dpmpp_2m", "stochasticity": {"4": 0.5, "2": 0.5}}
    (folder / "report.json").write_text(json.dumps(report))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    for text in (
        "5 captions of the run’s data, <here>.",
        "The CLIP big, 768 numbers a picture. Fréchet distances are usable from 2304 pictures a run on.",
        "Share of pictures that the feature network classifies as the thing in their prompt, of the 64 pictures of 256 "
        "whose prompt it knows.",
    ):
        assert text in page.texts
    assert any(
        "DPM-Solver++(2M)" in text and "stochasticity is 0.5 in 4 steps, 0.5 in 2 steps" in text for text in page.texts
    )


def test_prompts_are_escaped(folder: Path) -> None:
    text = (write_report(folder)).read_text(encoding="utf-8")
    assert "a &lt;red&gt; heart" in text
    assert "<red>" not in text


def test_report_of_a_teacher_alone_has_no_targets(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report |= {"student": None, "targets": [], "gaps": []}
    report["runs"] = [run for run in report["runs"] if run["name"].startswith("teacher")]
    for run in report["runs"]:
        run["prompt_accuracy"] = run["diversity"] = None
    (folder / "report.json").write_text(json.dumps(report))
    page = Page((write_report(folder)).read_text(encoding="utf-8"))
    assert page.open == []
    assert not any("targets met" in text for text in page.texts)
    assert target_lines(read_page(folder)) == []
    assert terminal_table(run_table(read_report(folder))).row_count == 8


def test_folder_without_an_evaluation_raises_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="flash-diffusion evaluate"):
        write_report(tmp_path)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A zero-shot evaluation's output."""
    runs = [
        SamplingSetting("student", 4),
        SamplingSetting("teacher", 25, 7.5),
        SamplingSetting("student", 2),
        SamplingSetting("teacher", 4),
    ]
    files = {
        run.label: save_pictures(torch.full((2, 3, 8, 8), index / 4), tmp_path, run.name)
        for index, run in enumerate(runs)
    }
    report = {
        "kind": "zero-shot",
        "protocol": {"name": "coco2017-5k", "annotations": "captions.json", "pictures": "val2017", "samples": 5000,
                     "size": 512, "caption_prefix": "", "captions": 5000, "references": 5000, "rule": "the first",
                     "framing": "as it is"},
        "student": "tiny",
        "teacher": "SD <1.5>",
        "weights": {},
        "resolution": [512, 640],
        "timesteps": {run.label: [999.0, 312.25] for run in runs},
        "sampling": {"solver": "euler", "stochasticity": {"4": 0.5, "2": 1.0}},
        "networks": {"inception": "6726825d", "published_inception": True, "clip": "ViT-g/14"},
        "environment": {"device": "cuda:0", "processes": 8},
        "runs": [
            {"name": run.label, "role": run.role, "steps": run.steps, "guidance": run.guidance, "nfe": run.nfe,
             "fid": 20.0 + run.steps, "clip": 0.3 + run.nfe / 1000, "seconds_per_image": None}
            for run in runs
        ],
        "settings": {"seed": 5, "precision": "bf16", "batch_size": 32},
        "pictures": {"prompts": PROMPTS, "files": files, "coco": files["teacher 4 steps"]},
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_zero_shot_page_shows_scores_and_pictures(scores: Path) -> None:
    text = write_report(scores).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) == 2 * 5  # four runs and COCO's own
    assert "tiny on COCO" in page.texts
    for value in ("24.00", "22.00", "45.00", "0.304", "0.350"):
        assert value in page.texts
    assert "SD &lt;1.5&gt;" in text
    assert "a &lt;red&gt; heart" in text
    assert "640 × 512 px" in text  # width first
    assert "999, 312.25" in text
    assert any("Euler’s method" in part and "0.5 in 4 steps, 1 in 2 steps" in part for part in page.texts)
    assert not any("compare these figures only" in part.lower() for part in page.texts)
    order = [page.texts.index(name) for name in ("student 2 steps", "student 4 steps", "teacher 4 steps")]
    assert order == sorted(order)
    assert terminal_table(score_table(read_report(scores))).row_count == 4


def test_scores_that_are_not_comparable_say_so(scores: Path) -> None:
    report = json.loads((scores / "report.json").read_text())
    assert comparability(report["protocol"], report["networks"]) == []
    report["protocol"]["captions"] = 100
    report["networks"] |= {"published_inception": False, "clip": None}
    report["pictures"]["coco"] = []
    for run in report["runs"]:
        run["clip"] = None
    (scores / "report.json").write_text(json.dumps(report))
    page = Page(write_report(scores).read_text(encoding="utf-8"))
    assert len(page.addresses) == 2 * 4
    assert (
        sum("Compare these figures only" in part or "so compare these figures only" in part for part in page.texts) == 2
    )
    assert any("100 of 5000 captions" in part for part in page.texts)
    assert any("100 pictures a run are too few for Inception's 2048 features" in part for part in page.texts)


def test_linear_chart_is_to_scale() -> None:
    line = Line("student", ((1, 0.30), (2, 0.31), (4, 0.33)), ("a", "b", "c"))
    svg = passes_chart("CLIP", [line], None, "", log=False)
    heights = [float(y) for y in re.findall(r'<circle[^>]*cy="([\d.]+)"', svg)]
    assert heights[0] > heights[1] > heights[2]
    assert (heights[0] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(3, abs=0.05)
    flat = passes_chart("CLIP", [Line("student", ((1, 0.3),), ("a",))], None, "", log=False)
    assert "nan" not in flat


def test_groups_hold_every_run_once(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    groups = run_groups(report)
    assert [group.kind for group in groups] == ["aim", "student", "plain", "guided"]
    assert sorted(run["name"] for group in groups for run in group.runs) == sorted(
        run["name"] for run in report["runs"]
    )


def test_training_log_becomes_curves(folder: Path) -> None:
    log = folder / "log.jsonl"
    lines = [
        {"update": update, "phase": "warm-up" if update < 50 else "phase 1", "images_per_second": 9, "lr": 1e-4,
         "distillation": 1 / update, "dmd": 0.0, "total": 1 / update, **({"adversarial": 0.5} if update >= 50 else {})}
        for update in range(10, 110, 10)
    ]  # fmt: skip
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"update": 110, "tot')
    assert [entry["update"] for entry in read_log(log)] == list(range(10, 110, 10))
    charts = training_charts(read_log(log))
    assert [chart.title for chart in charts] == ["total", "distillation", "adversarial"]
    assert charts[0].svg.count('class="phase"') == 1
    assert ">phase 1</text>" in charts[0].svg
    assert "<h2>Training</h2>" in (write_report(folder, log)).read_text(encoding="utf-8")
    log.write_text("no json\n" + log.read_text())
    with pytest.raises(UserError, match="line 1"):
        read_log(log)


def test_what_a_training_said_of_its_health_stands_above_its_curves(folder: Path) -> None:
    log = folder / "log.jsonl"
    lines: list[dict[str, Any]] = [
        {"update": 1000, "total": 2.0, "latent_contrast": 1.0},
        {"update": 1500, "total": 1.0, "latent_contrast": 0.8, "warnings": ["the student's latents lose contrast"]},
        {"update": 2000, "total": 0.9, "latent_contrast": 0.97, "over": ["the contrast is 0.97"]},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = write_report(folder, log).read_text(encoding="utf-8").partition("<h2>Training</h2>")[2]
    said, _, curves = training.partition("<svg")
    assert '<li class="bad">Update 1,500: the student&#39;s latents lose contrast.</li>' in said
    assert '<li class="good">Update 2,000: the contrast is 0.97.</li>' in said
    assert "student divided by teacher, latents from the same starts" in said + curves


def test_numbers_are_written_for_people() -> None:
    written = [number(value) for value in (0.012345, 1.2345, 12.345, 1234.5, 0.0, -0.05, None)]
    assert written == ["0.0123", "1.23", "12.3", "1234", "0", "-0.0500", "–"]
    assert [share(value) for value in (0.987, None)] == ["99 %", "–"]
    assert [seconds(value) for value in (1.234, 0.0123)] == ["1.23 s", "12.3 ms"]
    assert [signed(value) for value in (0.3, -0.3, None)] == ["+0.300", "-0.300", "–"]
    assert [listed(values) for values in ([4, 2, 1], [4])] == ["4, 2 or 1", "4"]


def test_chart_marks_are_to_scale() -> None:
    line = Line("student", ((1, 10.0), (2, 1.0), (4, 0.1)), ("a", "b", "<c>"))
    svg = passes_chart("x & y", [line], 1.0, "level")
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x1, y1), (x2, y2), (x3, y3) = dots
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # passes double
    assert y2 - y1 == pytest.approx(y3 - y2, abs=0.2)  # a tenth each
    assert y1 < y2 < y3  # larger values lie higher
    level = float(re.search(r'class="level" d="M\d+ ([\d.]+)H', svg).group(1))
    assert level == pytest.approx(y2, abs=0.1)
    assert "x &amp; y" in svg
    assert "&lt;c&gt;" in svg


@given(st.floats(1e-6, 1e6), st.floats(1.5, 1e4), st.booleans())
def test_axis_ticks_are_few_round_and_inside(low: float, ratio: float, log: bool) -> None:
    axis = Axis(low, low * ratio, 100, 0, log)
    ticks = axis.ticks()
    assert len(ticks) <= 12
    assert ticks == sorted(ticks)
    for tick in ticks:
        assert -0.01 <= axis(tick) <= 100.01
        mantissa = float(f"{tick:.6e}".split("e")[0]) if tick else 0.0
        assert not log or round(mantissa, 4) in (1, 2, 5, 10)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50), st.floats(-3, 3))
def test_running_mean_stays_between_its_values(values: list[float], constant: float) -> None:
    means = running_mean(values)
    assert means[0] == values[0]
    assert all(min(values) - 1e-9 <= mean <= max(values) + 1e-9 for mean in means)
    assert running_mean([constant] * 9) == pytest.approx([constant] * 9)


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    points = [(float(index), 1.0) for index in range(10_001)]
    few = thinned(points)
    assert len(few) <= 241
    assert few[0] == points[0]
    assert few[-1] == points[-1]
    assert curve_chart("flat", points, []).count("<path") >= 2
