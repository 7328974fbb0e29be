"""The page and the table of a comparison with the teacher; its text is in ``report_comparison.html``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import Line, passes_chart
from .html_page import Chart, Column, Columns, Grid, Group, number, render, seconds, share, terminal_table

if TYPE_CHECKING:
    from rich.table import Table


def comparison_page(report: dict[str, Any], folder: Path, curves: Sequence[Chart]) -> str:
    """The page of a report whose pictures are in ``folder``.

    Args:
        curves: of the student's training.
    """
    return render(
        "report_comparison.html",
        report=report,
        title=report["student"] or "Teacher",
        many=report["runs"][0],
        best=next((run for run in report["runs"] if run["name"].startswith("student")), None),
        groups=run_groups(report),
        pictures=picture_grid(report, folder),
        charts=distance_charts(report),
        curves=curves,
        limit=target_limit,
    )


def run_groups(report: dict[str, Any]) -> list[Group]:
    """The runs as a reader compares them: the aim, the student, and the teacher in as few steps."""
    many, *rest = report["runs"]

    def pick(role: str, guided: bool) -> tuple[dict[str, Any], ...]:
        return tuple(run for run in rest if run["name"].startswith(role) and (run["guidance"] != 1) == guided)

    groups = [
        Group("Teacher", "aim", (many,)),
        Group("Student", "student", pick("student", False)),
        Group("Undistilled teacher, no guidance", "plain", pick("teacher", False)),
        Group("Undistilled teacher, guided", "guided", pick("teacher", True)),
    ]
    return [group for group in groups if group.runs]


def picture_grid(report: dict[str, Any], folder: Path) -> Grid:
    """The grid: the teacher, the student, and the undistilled teacher with the student's number of passes."""
    files = report["pictures"]["files"]
    return Grid(
        tuple(
            Columns(group.title, group.kind, tuple(Column.of(run, files[run["name"]]) for run in group.runs))
            for group in run_groups(report)
            if group.kind != "guided"
        ),
        tuple(report["pictures"]["prompts"]),
        folder,
    )


def summary_table(report: dict[str, Any]) -> Table:
    """The runs as a table for the terminal."""
    table = terminal_table(f"Distance to the teacher; floor {number(report['floor']['fd'])}")
    for title in ("run", "NFE", "FD", "x floor", "KID", "paired", "acc.", "div.", "each"):
        table.add_column(title, justify="left" if title == "run" else "right", no_wrap=True)
    for run in report["runs"]:
        table.add_row(
            run["name"],
            str(run["nfe"]),
            number(run["fd"]),
            number(run["fd"] / report["floor"]["fd"]),
            number(run["kid"]),
            number(run["paired"]),
            share(run["prompt_accuracy"]),
            number(run["diversity"]),
            seconds(run["seconds_per_image"]),
            style="bold" if run["name"].startswith("student") else None,
        )
    return table


def target_lines(report: dict[str, Any]) -> Iterator[str]:
    """Each target in words."""
    for target in report["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        yield f"{verdict}: {target['run']}, {number(target['value'])} {target['measure']} ({target_limit(target)})"


def target_limit(target: dict[str, Any]) -> str:
    """What was asked, and what the teacher itself would score where that is less."""
    if "at_most" in target:
        return f"at most {target['at_most']:g}"
    beyond = target["perfect"] < target["at_least"]
    return f"at least {target['at_least']:g}" + (f"; the floor is at {number(target['perfect'])}" if beyond else "")


def distance_charts(report: dict[str, Any]) -> list[Chart]:
    """Distance against passes, of the distributions and of pairs of pictures."""
    many = report["runs"][0]

    def chart(key: str, title: str, caption: str, level: float | None, level_name: str) -> Chart:
        lines = []
        for group in run_groups(report)[1:]:
            runs = sorted(group.runs, key=lambda run: run["nfe"])
            tips = tuple(f"{run['name']}: {run['nfe']} passes, {title} {number(run[key])}" for run in runs)
            lines.append(Line(group.kind, tuple((run["nfe"], run[key]) for run in runs), tips))
        return Chart(title, caption, passes_chart(title, lines, level, level_name))

    return [
        chart(
            "fd",
            "Fréchet distance",
            "Of the pictures as a whole from the teacher’s. The teacher itself, drawing anew, scores the floor.",
            report["floor"]["fd"],
            "floor: the teacher against itself",
        ),
        chart(
            "paired",
            "Paired distance",
            "Of each picture from the one the teacher draws from the same prompt and noise. 0 is the same picture.",
            many["diversity"],
            "two teacher pictures of one prompt",
        ),
    ]
