"""The page and the table of a zero-shot evaluation; its text is in ``report_zero_shot.html``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import Line, passes_chart
from .html_page import Chart, Column, Columns, Grid, Group, number, render, seconds, terminal_table

if TYPE_CHECKING:
    from rich.table import Table


def zero_shot_page(report: dict[str, Any], folder: Path, curves: Sequence[Chart]) -> str:
    """The page of a report whose pictures are in ``folder``.

    Args:
        curves: of the student's training.
    """
    groups = score_groups(report)
    return render(
        "report_zero_shot.html",
        report=report,
        title=report["student"] or report["teacher"],
        groups=groups,
        notes=list(notes(report)),
        pictures=picture_grid(report, folder),
        charts=score_charts(groups),
        curves=curves,
    )


def score_groups(report: dict[str, Any]) -> list[Group]:
    """The student's runs, the teacher's without guidance and with; each from few steps to many."""

    def pick(role: str, guided: bool | None) -> tuple[dict[str, Any], ...]:
        runs = [run for run in report["runs"] if run["role"] == role and guided in (None, run["guidance"] != 1)]
        return tuple(sorted(runs, key=lambda run: (run["nfe"], run["guidance"])))

    groups = [
        Group("Student", "student", pick("student", None)),
        Group("Teacher, no guidance", "plain", pick("teacher", False)),
        Group("Teacher, guided", "guided", pick("teacher", True)),
    ]
    return [group for group in groups if group.runs]


def picture_grid(report: dict[str, Any], folder: Path) -> Grid:
    """COCO's pictures, where the captions are COCO's, and every run's of the same captions."""
    files, original = report["pictures"]["files"], report["pictures"]["coco"]
    groups = (
        [Columns("COCO", "aim", (Column("the picture", ("of the caption",), tuple(original)),))] if original else []
    )
    for group in score_groups(report):
        columns = [Column.of(run, files[run["name"]]) for run in group.runs]
        groups.append(Columns(group.title, group.kind, tuple(columns)))
    return Grid(tuple(groups), tuple(report["pictures"]["prompts"]), folder)


def score_charts(groups: Sequence[Group]) -> list[Chart]:
    """FID and CLIP score against passes."""

    def chart(key: str, title: str, caption: str, log: bool) -> Chart:
        lines = []
        for group in groups:
            tips = tuple(f"{run['name']}: {run['nfe']} passes, {title} {number(run[key])}" for run in group.runs)
            lines.append(Line(group.kind, tuple((run["nfe"], run[key]) for run in group.runs), tips))
        return Chart(title, caption, passes_chart(title, lines, None, "", log))

    charts = [chart("fid", "FID", "Distance from COCO’s pictures as a whole; lower is better.", True)]
    if all(run["clip"] is not None for group in groups for run in group.runs):
        charts.append(chart("clip", "CLIP score", "How well pictures fit their captions; higher is better.", False))
    return charts


def scores_table(report: dict[str, Any]) -> Table:
    """The runs as a table for the terminal."""
    protocol = report["protocol"]
    table = terminal_table(
        f"{protocol['name']}: {protocol['captions']} captions, {protocol['references']} pictures of COCO's"
    )
    for title in ("run", "guidance", "NFE", "FID", "CLIP", "each"):
        table.add_column(title, justify="left" if title == "run" else "right", no_wrap=True)
    for group in score_groups(report):
        for run in group.runs:
            table.add_row(
                run["name"],
                f"{run['guidance']:g}",
                str(run["nfe"]),
                number(run["fid"], 4),
                number(run["clip"]),
                "–" if run["seconds_per_image"] is None else seconds(run["seconds_per_image"]),
                style="bold" if run["role"] == "student" else None,
            )
    return table


def notes(report: dict[str, Any]) -> Iterator[str]:
    """What keeps these figures from standing beside published ones, if anything."""
    protocol = report["protocol"]
    if protocol["captions"] != protocol["samples"]:
        yield (
            f"not the whole protocol: {protocol['captions']} of {protocol['samples']} captions; FID falls with their "
            "number, so these figures compare with each other alone"
        )
    if not report["networks"]["published_inception"]:
        yield "Inception's weights are not the published file; these figures compare with each other alone"
