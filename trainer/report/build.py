"""`flash-diffusion report`: turn `report.json`, its pictures and the training's log into `report.html` and tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import write_whole
from ..health.figures import OVER, WARNINGS
from .blocks import Finding, Findings, Page, RunTable, Targets
from .charts import read_log, training_charts
from .coco_page import coco_page, comparability
from .task_page import task_page
from .teacher_page import teacher_page

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PAGES = {"teacher": teacher_page, "task": task_page, "zero-shot": coco_page}


def read_report(folder: Path) -> dict[str, Any]:
    """Read the figures of an evaluation; a report of an earlier version gets the entries that it lacks.

    Raises:
        UserError: ``folder`` holds no ``report.json``, or a report of an unknown kind.
    """
    source = folder / "report.json"
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder that `flash-diffusion evaluate` wrote (--output)")
    if not source.is_file():
        raise UserError(f"{folder} holds no report.json; make one with `flash-diffusion evaluate --output {folder}`")
    try:
        report: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{source} is not JSON ({error}); evaluate again") from error
    if not isinstance(report, dict) or "runs" not in report or report.setdefault("kind", "teacher") not in PAGES:
        raise UserError(
            f"{source} is not a report that this version reads; expected one written by `flash-diffusion evaluate`, of "
            f"kind {', '.join(PAGES)}"
        )
    report.setdefault("gaps", [])
    if "notes" not in report:
        whole = report["kind"] == "zero-shot"
        report["notes"] = comparability(report["protocol"], report["networks"]) if whole else []
    return report


def read_page(folder: Path, log: Path | None = None) -> Page:
    """Return the page of the evaluation in ``folder``.

    Args:
        log: the ``log.jsonl`` of the student's training, for the curves.
    """
    report = read_report(folder)
    entries = read_log(log) if log is not None and log.is_file() else []
    curves, health = tuple(training_charts(entries)), tuple(health_findings(entries))
    with _damage_explained(folder / "report.json"):
        return replace(PAGES[report["kind"]](report, folder), curves=curves, health=health)


def health_findings(entries: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Yield what a training's log says of its health, in the order in which it was said."""
    for entry in entries:
        for key, good in ((WARNINGS, False), (OVER, True)):
            for sentence in entry.get(key, ()):
                yield Finding(f"Update {entry['update']:,}: {sentence}.", good)


@contextmanager
def _damage_explained(source: Path) -> Iterator[None]:
    """Turn what a damaged report makes a page raise into a readable error.

    Raises:
        UserError: an entry of the report is missing, or has another form.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise UserError(
            f"{source} is damaged: an entry is missing or has another form ({type(error).__name__}: {error}); evaluate "
            "again"
        ) from error


def render(page: Page) -> str:
    """Return a page as one HTML file that fetches nothing; ``report.html`` is the template.

    Pictures are embedded, charts are inline SVG, and colours follow the reader's light or dark setting.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    return environment.get_template("report.html").render(page=page)


def write_report(folder: Path, log: Path | None = None) -> Path:
    """Write ``folder/report.html`` from ``folder/report.json`` and its pictures; return the page's path.

    Args:
        log: the ``log.jsonl`` of the student's training, for the curves.

    Raises:
        UserError: there is no evaluation in ``folder``.
    """
    page = read_page(folder, log)
    with _damage_explained(folder / "report.json"):
        text = render(page)
    path = folder / "report.html"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def print_report(folder: Path, path: Path, console: Console) -> None:
    """Print tables, targets, notes and the page's path."""
    page = read_page(folder)
    for block in page.blocks:
        if isinstance(block, RunTable) and block.terminal is not None:
            console.print(terminal_table(block))
    for line in [*finding_lines(page), *target_lines(page)]:
        console.print(line, highlight=False)
    for note in page.notes:
        console.print(f"note: {note}", highlight=False)
    console.print(f"report  {path}", highlight=False, soft_wrap=True)


def target_lines(page: Page) -> list[str]:
    """Return one line per target."""
    return [card.line for block in page.blocks if isinstance(block, Targets) for card in block.cards]


def finding_lines(page: Page) -> list[str]:
    """Return one line per finding."""
    return [finding.text for block in page.blocks if isinstance(block, Findings) for finding in block.findings]


def terminal_table(block: RunTable) -> Table:
    """Return a table for the terminal: narrow, since 80 columns would break every cell over lines."""
    from rich.table import Table

    table = Table(title=block.terminal, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    columns = [(column, column.short) for column in block.columns if column.short is not None]
    for index, (_, short) in enumerate(columns):
        table.add_column(short, justify="right" if index else "left", no_wrap=True)
    for group in block.groups:
        for run in group.runs:
            cells = [column.of(run).text for column, _ in columns]
            table.add_row(*cells, style="bold" if group.kind == "student" else None)
    return table


# -- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flash-diffusion report`."""
    parser.add_argument("folder", type=Path, help="folder that `flash-diffusion evaluate` wrote (--output)")
    parser.add_argument("--log", type=Path, help="log.jsonl of the training, for its curves (default: in the folder)")


def run(args: argparse.Namespace) -> int:
    """Write `report.html` again and print the figures."""
    from rich.console import Console

    folder = args.folder.expanduser()
    if args.log is not None and not args.log.expanduser().is_file():
        raise UserError(f"--log: there is no file {args.log}; give the log.jsonl of the training, or leave --log out")
    log = folder / "log.jsonl" if args.log is None else args.log.expanduser()
    print_report(folder, write_report(folder, log), Console())
    return 0
