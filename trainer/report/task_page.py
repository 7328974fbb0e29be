"""The page and the table of an evaluation on a conditional task; its text is in ``report_task.html``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import Line, passes_chart
from .html_page import Chart, Column, Columns, Grid, Group, number, render, seconds, terminal_table

if TYPE_CHECKING:
    from rich.table import Table


def task_page(report: dict[str, Any], folder: Path, curves: Sequence[Chart]) -> str:
    """The page of a report whose pictures are in ``folder``.

    Args:
        curves: of the student's training.
    """
    runs = {run["name"]: run for run in report["runs"]}
    titles = {figure["key"]: figure for figure in report["figures"]}
    rivals = dict.fromkeys(line["rival"] for line in report["comparisons"])
    return render(
        "report_task.html",
        signed=signed,
        report=report,
        title=f"{report['student'] or report['teacher']}, {report['task']}",
        many=runs[report["many"]],
        students=[run for run in report["runs"] if run["role"] == "student"],
        groups=run_groups(report),
        pictures=picture_grid(report, folder),
        charts=figure_charts(report),
        rivals=[(runs[rival], [line for line in report["comparisons"] if line["rival"] == rival]) for rival in rivals],
        headline=target_value,
        sentence=lambda target: target_sentence(target, titles[target["figure"]]),
        limit=lambda target: target_limit(target, titles[target["figure"]]),
        curves=curves,
    )


def run_groups(report: dict[str, Any]) -> list[Group]:
    """The runs as a reader compares them: the aim, the student, and the teacher in as few steps."""
    many = report["many"]

    def pick(role: str, guided: bool = False) -> tuple[dict[str, Any], ...]:
        return tuple(
            run
            for run in report["runs"]
            if run["role"] == role and run["name"] != many and (run["guidance"] != 1) == guided
        )

    teacher = tuple(run for run in report["runs"] if run["name"] == many)
    without = tuple(run for run in report["runs"] if run["role"] == "without")
    groups = [
        Group("Yardsticks", "aim", (*pick("original"), *teacher, *without), lines=False),
        Group("Student", "student", pick("student")),
        Group("Undistilled teacher, no guidance", "plain", pick("teacher")),
        Group("Undistilled teacher, guided", "guided", pick("teacher", guided=True)),
    ]
    return [group for group in groups if group.runs]


def picture_grid(report: dict[str, Any], folder: Path) -> Grid:
    """What was given and what came out; of the undistilled teacher what has the steps of the student's best."""
    pictures, files = report["pictures"], report["pictures"]["files"]
    given = [Column(title, (), tuple(drawn)) for title, drawn in pictures["drawn"].items()]
    groups = [Columns("Given", "aim", (*given, Column("original", (), tuple(pictures["original"]))))]
    for group in run_groups(report):
        runs = [run for run in group.runs if run["role"] != "original"]
        if group.kind in ("plain", "guided"):
            runs = [run for run in runs if run["steps"] == 4]
        title = {"aim": "Teacher", "plain": "No guidance", "guided": "Guided"}.get(group.kind, group.title)
        if runs:
            columns = [
                Column("without" if run["role"] == "without" else column.title, column.notes, column.files)
                for run in runs
                for column in [Column.of(run, files[run["name"]])]
            ]
            groups.append(Columns(title, group.kind, tuple(columns)))
    prompts = [prompt or f"no. {row + 1}" for row, prompt in enumerate(pictures["prompts"])]
    return Grid(tuple(groups), tuple(prompts), folder)


def figure_charts(report: dict[str, Any]) -> list[Chart]:
    """Every figure against passes."""
    many = next(run for run in report["runs"] if run["name"] == report["many"])

    def chart(figure: dict[str, Any]) -> Chart:
        lines = []
        for group in run_groups(report):
            runs = sorted((run for run in group.runs if group.lines), key=lambda run: run["nfe"])
            points = [(run, run["figures"][figure["key"]]["value"]) for run in runs]
            points = [(run, value) for run, value in points if value is not None]
            tips = tuple(
                f"{run['name']}: {run['nfe']} passes, {figure['short']} {number(value)}" for run, value in points
            )
            if points:
                lines.append(Line(group.kind, tuple((run["nfe"], value) for run, value in points), tips))
        level = many["figures"][figure["key"]]["value"]
        direction = "Higher" if figure["higher_is_better"] else "Lower"
        caption = f"{direction} is better{', in ' + figure['unit'] if figure['unit'] else ''}."
        svg = passes_chart(figure["title"], lines, level, f"teacher, {many['steps']} steps", figure["key"] == "fd")
        return Chart(figure["title"], caption, svg)

    return [chart(figure) for figure in report["figures"] if many["figures"][figure["key"]]["value"] is not None]


def summary_table(report: dict[str, Any]) -> Table:
    """The runs as a table for the terminal."""
    table = terminal_table(f"{report['task']}, {report['settings']['samples']} samples")
    table.add_column("run", no_wrap=True)
    for figure in report["figures"]:
        table.add_column(f"{figure['short']} {'↑' if figure['higher_is_better'] else '↓'}", justify="right")
    table.add_column("each", justify="right", no_wrap=True)
    for run in report["runs"]:
        table.add_row(
            run["name"],
            *(number(run["figures"][figure["key"]]["value"]) for figure in report["figures"]),
            seconds(run["seconds_per_image"]),
            style="bold" if run["role"] == "student" else None,
        )
    return table


def target_lines(report: dict[str, Any]) -> Iterator[str]:
    """Each target in words, then what was not measured."""
    titles = {figure["key"]: figure for figure in report["figures"]}
    for target in report["targets"]:
        figure = titles[target["figure"]]
        yield (
            f"{'met' if target['met'] else 'MISSED'}: {target['run']}, {target_sentence(target, figure)}: "
            f"{target_value(target)} ({target_limit(target, figure)})"
        )
    yield from report["notes"]


def target_value(target: dict[str, Any]) -> str:
    """``1.04 ×``, or ``+0.3``."""
    if target["kind"] == "better":
        return signed(target["value"])
    return "–" if target["value"] is None else f"{number(target['value'])} ×"


def target_sentence(target: dict[str, Any], figure: dict[str, Any]) -> str:
    """What is compared with what."""
    if target["kind"] == "within":
        return f"{figure['title']}, of the figure of {target['rival']}"
    return f"{figure['title']}, better than {target['rival']} without guidance"


def target_limit(target: dict[str, Any], figure: dict[str, Any]) -> str:
    """What was asked."""
    if target["kind"] == "better":
        unit = f" {figure['unit']}" if figure["unit"] else ""
        return f"above 0{unit} in 95 %: {signed(target['low'])} … {signed(target['high'])}"
    return f"at most {target['at_most']:g}" if "at_most" in target else f"at least {target['at_least']:g}"


def signed(value: float | None) -> str:
    """``+0.3`` or ``−0.3``, a dash for no value."""
    if value is None:
        return "–"
    return f"{'−' if value < 0 else '+'}{number(abs(value))}"
