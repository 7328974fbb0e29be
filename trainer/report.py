"""One self-contained page from an evaluation: `report.json`, its pictures and the training's log become `report.html`.

Nothing in the page is fetched: pictures are embedded, charts (`charts.py`) are inline SVG, colours follow the reader's
light or dark setting. The page's text and style are in `report_template.html`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import Line, curve_chart, passes_chart
from .errors import UserError

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import Console
    from rich.table import Table

TEMPLATE = Path(__file__).with_name("report_template.html")
PICTURE_SIZE = 256  # px; larger pictures are reduced for the page
PICTURE_QUALITY = 90  # of WebP
NO_CURVE = {"update", "phase", "progress", "lr", "images_per_second", "seconds"}  # a log's numbers that are no losses


def write_report(folder: Path, log: Path | None = None) -> Path:
    """Write ``folder/report.html`` from ``folder/report.json`` and the pictures it names.

    Args:
        log: the ``log.jsonl`` of the student's training, for the curves.

    Returns:
        The page's path.

    Raises:
        UserError: there is no evaluation in ``folder``.
    """
    from jinja2 import Environment, StrictUndefined

    source = folder / "report.json"
    if not source.is_file():
        raise UserError(f"{folder} holds no report.json; make one with `flash-diffusion evaluate --output {folder}`")
    report = json.loads(source.read_text(encoding="utf-8"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=number, plain="{:g}".format, share=share, seconds=seconds, listed=listed, limit=target_limit
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        many=report["runs"][0],
        best=next((run for run in report["runs"] if run["name"].startswith("student")), None),
        groups=run_groups(report),
        pictures=picture_grid(report, folder),
        charts=distance_charts(report),
        curves=training_charts(read_log(log)) if log is not None and log.is_file() else [],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Group:
    """Runs that belong together in a table or a grid; ``kind`` is their colour."""

    title: str
    kind: str
    runs: tuple[dict[str, Any], ...]


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


@dataclass(frozen=True)
class Row:
    """One prompt's pictures as data URIs, one for each run of the grid, in the groups' order."""

    prompt: str
    pictures: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Pictures: columns are the groups' runs, rows are prompts."""

    groups: tuple[Group, ...]
    rows: tuple[Row, ...]


def picture_grid(report: dict[str, Any], folder: Path) -> Grid:
    """The grid: the teacher, the student, and the undistilled teacher with the student's number of passes."""
    groups = tuple(group for group in run_groups(report) if group.kind != "guided")
    files = report["pictures"]["files"]
    return Grid(
        groups,
        tuple(
            Row(prompt, tuple(data_uri(folder / files[run["name"]][row]) for group in groups for run in group.runs))
            for row, prompt in enumerate(report["pictures"]["prompts"])
        ),
    )


def data_uri(path: Path) -> str:
    """A picture file as it stands in the page."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
        stream = io.BytesIO()
        picture.convert("RGB").save(stream, "WEBP", quality=PICTURE_QUALITY, method=6)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def number(value: float | None, digits: int = 3) -> str:
    """``0.0123``, ``1.23``, ``12.3``, ``1230``: so many significant digits, a dash for no value."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{min(decimals, 6)}f}"


def listed(values: Sequence[object]) -> str:
    """``4, 2 or 1``."""
    *rest, last = [str(value) for value in values]
    return f"{', '.join(rest)} or {last}" if rest else last


def share(value: float | None) -> str:
    """``0.987`` as ``99 %``."""
    return "–" if value is None else f"{100 * value:.0f} %"


def seconds(value: float) -> str:
    """``1.23 s`` or ``12.3 ms``."""
    return f"{number(value)} s" if value >= 0.1 else f"{number(1000 * value)} ms"


def summary_table(report: dict[str, Any]) -> Table:
    """The runs as a table for the terminal."""
    from rich.table import Table

    # Narrow enough for 80 columns, where a log or a small terminal would break every cell over lines.
    table = Table(
        title=f"Distance to the teacher; floor {number(report['floor']['fd'])}",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
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


@dataclass(frozen=True)
class Chart:
    """A figure of the page: its title, what it says, and the SVG."""

    title: str
    caption: str
    svg: Markup


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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The updates in a training's log, one JSON object a line.

    A last line that a killed process left unfinished is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for index, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if index + 1 < len(lines):
                raise UserError(f"{path}, line {index + 1} is not JSON: {error}; expected one object a line") from error
    return [entry for entry in entries if "update" in entry]


def training_charts(entries: Sequence[dict[str, Any]]) -> list[Chart]:
    """One chart for each loss in the log, the total first."""

    def finite(entry: dict[str, Any], name: str) -> bool:
        value = entry.get(name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    names = dict.fromkeys(name for entry in entries for name in entry if name not in NO_CURVE and finite(entry, name))
    phases = [(entry["update"], entry.get("phase", 0)) for entry in entries]
    charts = []
    for name in sorted(names, key=lambda name: name != "total"):
        points = [(float(entry["update"]), float(entry[name])) for entry in entries if finite(entry, name)]
        if len(points) > 1 and any(value for _, value in points):  # a term with weight 0 is always 0
            title = name.replace("_", " ")
            charts.append(Chart(title, "", curve_chart(title, points, phases)))
    return charts


# -- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion report`."""
    parser.add_argument("folder", type=Path, help="what `flash-diffusion evaluate` wrote: report.json and pictures/")
    parser.add_argument("--log", type=Path, help="log.jsonl of the training (default: the one in the folder, if any)")


def run(args: argparse.Namespace) -> int:
    """Write `report.html` again and print the numbers."""
    from rich.console import Console

    print_report(args.folder, write_report(args.folder, args.log or args.folder / "log.jsonl"), Console())
    return 0


def print_report(folder: Path, page: Path, console: Console) -> None:
    """The numbers, the targets and where the page is, in the terminal."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    console.print(summary_table(report))
    for line in target_lines(report):
        console.print(line, highlight=False)
    console.print(f"report  {page}", highlight=False, soft_wrap=True)
