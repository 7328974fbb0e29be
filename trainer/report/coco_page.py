"""The page of a zero-shot evaluation on COCO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .blocks import (
    Charts,
    Facts,
    Group,
    Page,
    PictureColumn,
    PictureGrid,
    PictureGroup,
    Run,
    RunTable,
    Section,
    Settings,
    TableColumn,
    chart_of,
    sampling_words,
)
from .numbers import capital, number, seconds

Report = Mapping[str, Any]


def coco_page(report: Report, folder: Path) -> Page:
    """Return the page of a report whose pictures are in ``folder``."""
    protocol, (height, width) = report["protocol"], report["resolution"]
    groups = run_groups(report)
    name = report["student"] or report["teacher"]
    return Page(
        over=f"Flash Diffusion · {protocol['name']}",
        name=name,
        title=f"{name} on COCO",
        lead=f"{protocol['captions']} captions, compared with {protocol['references']} of COCO’s own pictures; "
        f"{width} × {height} px pictures of {report['teacher']}.",
        notes=tuple(report["notes"]),
        sections=(
            Section("Scores", (score_table(report), Charts(score_charts(groups)))),
            Section(
                "Pictures",
                (picture_grid(report, folder),),
                "One row per caption; all pictures of a row start from the same noise. These are the first captions of "
                "the draw, not a selection.",
            ),
        ),
        method=Section(
            "How it was measured",
            (
                Facts(_facts(report)),
                Settings({key: report[key] for key in ("protocol", "settings", "weights", "networks", "environment")}),
            ),
        ),
    )


def comparability(protocol: Mapping[str, Any], networks: Mapping[str, Any]) -> list[str]:
    """Return why the scores can't be compared with published scores; empty where they can."""
    from ..metrics.inception import FEATURES  # brings torch, which a page does not need

    found = []
    if protocol["captions"] <= FEATURES:
        found.append(
            f"{protocol['captions']} pictures a run are too few for Inception's {FEATURES} features: FID is then "
            f"mostly its own bias. It is usable from --samples {FEATURES + 1} on."
        )
    if protocol["captions"] != protocol["samples"]:
        found.append(
            f"Not the whole protocol: {protocol['captions']} of {protocol['samples']} captions. FID falls with the "
            "number of pictures, so compare these figures only with each other."
        )
    if not networks["published_inception"]:
        found.append("Inception's weights are not the published file. Compare these figures only with each other.")
    return found


def run_groups(report: Report) -> list[Group]:
    """Return the student's runs, the teacher's without guidance, the teacher's with; each from few steps to many."""

    def pick(role: str, guided: bool | None) -> tuple[Run, ...]:
        runs = [run for run in report["runs"] if run["role"] == role and guided in (None, run["guidance"] != 1)]
        return tuple(sorted(runs, key=lambda run: (run["nfe"], run["guidance"])))

    groups = [
        Group("Student", "student", pick("student", None)),
        Group("Teacher, no guidance", "plain", pick("teacher", False)),
        Group("Teacher, guided", "guided", pick("teacher", True)),
    ]
    return [group for group in groups if group.runs]


def picture_grid(report: Report, folder: Path) -> PictureGrid:
    """Return the grid: COCO's pictures, where the captions are COCO's, then every run's."""
    files, original = report["pictures"]["files"], report["pictures"]["coco"]
    column = PictureColumn("the picture", ("of the caption",), tuple(original))
    groups = [PictureGroup("COCO", "aim", (column,))] if original else []
    for group in run_groups(report):
        columns = tuple(PictureColumn.of(run, files[run["name"]]) for run in group.runs)
        groups.append(PictureGroup(group.title, group.kind, columns))
    return PictureGrid(tuple(groups), tuple(report["pictures"]["prompts"]), folder)


def score_charts(groups: list[Group]) -> tuple[Any, ...]:
    """Return the charts of FID and CLIP score against passes."""
    fid = chart_of(groups, lambda run: run["fid"], "FID", "Distance from COCO’s pictures as a whole; lower is better.")
    if any(run["clip"] is None for group in groups for run in group.runs):
        return (fid,)
    caption = "How well pictures fit their captions; higher is better."
    return fid, chart_of(groups, lambda run: run["clip"], "CLIP score", caption, log=False)


def score_table(report: Report) -> RunTable:
    """Return the table of all runs."""
    protocol = report["protocol"]
    columns = (
        TableColumn("Run", "run", lambda run: run["name"]),
        TableColumn("Guidance", "guidance", lambda run: f"{run['guidance']:g}"),
        TableColumn("Passes\n(NFE)", "NFE", lambda run: str(run["nfe"])),
        TableColumn("FID", "FID", lambda run: number(run["fid"], 4)),
        TableColumn("CLIP score", "CLIP", lambda run: number(run["clip"])),
        TableColumn("Time per\npicture", "time", lambda run: seconds(run["seconds_per_image"])),
    )
    title = f"{protocol['name']}: {protocol['captions']} captions, {protocol['references']} pictures of COCO"
    return RunTable(columns, tuple(run_groups(report)), title)


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    protocol, settings, networks = report["protocol"], report["settings"], report["networks"]
    (height, width), where = report["resolution"], report["environment"]
    precision = "float32" if settings["precision"] == "no" else settings["precision"]
    published = "the published file" if networks["published_inception"] else "not the published file"
    facts = [
        (
            "Captions",
            f"{capital(protocol['rule'])}. {protocol['captions']} of the protocol’s {protocol['samples']}.",
        ),
        (
            "Pictures",
            f"Made at {width} × {height} px, each from its own seed, which follows from seed {settings['seed']} and "
            f"the caption’s number; passes in {precision}. All pictures, COCO’s too: {protocol['framing']}.",
        ),
        (
            "Timesteps",
            "; ".join(
                f"{name}: {', '.join(f'{step:g}' for step in steps)}" for name, steps in report["timesteps"].items()
            )
            + ".",
        ),
        *([("Sampling", sampling_words(report["sampling"]))] if "sampling" in report else []),
        ("Guidance", "w in uncond + w (cond - uncond). 1 = no guidance, one pass per step instead of two."),
        (
            "FID",
            f"Fréchet distance of Inception’s 2048 features between the run’s pictures and all "
            f"{protocol['references']} pictures of {protocol['pictures']}. Weights {networks['inception']}, "
            f"{published}.",
        ),
    ]
    if networks["clip"]:
        prefix = f", with “{protocol['caption_prefix']}” before the caption" if protocol["caption_prefix"] else ""
        facts.append(("CLIP score", f"Mean cosine of {networks['clip']} between picture and caption{prefix}."))
    facts.append(
        (
            "Time",
            f"Of the median batch: text encoder, network and decoder, on {where['processes']} × {where['device']}, "
            f"{settings['batch_size']} pictures at once.",
        )
    )
    return tuple(facts)
