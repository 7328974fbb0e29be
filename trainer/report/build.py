"""One self-contained page from an evaluation: `report.json`, its pictures and the training's log become `report.html`.

Which page depends on what was measured: `comparison_report.py`, `task_report.py` or `zero_shot_report.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from . import task_page as task_report
from .comparison_page import comparison_page, summary_table, target_lines
from .html_page import read_log, training_charts
from .zero_shot_page import notes, scores_table, zero_shot_page

if TYPE_CHECKING:
    from rich.console import Console

# Of the kinds of reports: the page, and the table and lines for the terminal. Without a kind it is a comparison.
PAGES = {"zero-shot": zero_shot_page, "task": task_report.task_page}
WORDS = {
    "zero-shot": (scores_table, notes),
    "task": (task_report.summary_table, task_report.target_lines),
}


def read_report(folder: Path) -> dict[str, Any]:
    """The numbers of an evaluation.

    Raises:
        UserError: there is none in ``folder``.
    """
    source = folder / "report.json"
    if not source.is_file():
        raise UserError(f"{folder} holds no report.json; make one with `flash-diffusion evaluate --output {folder}`")
    report: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return report


def write_report(folder: Path, log: Path | None = None) -> Path:
    """Write ``folder/report.html`` from ``folder/report.json`` and the pictures it names.

    Args:
        log: the ``log.jsonl`` of the student's training, for the curves.

    Returns:
        The page's path.

    Raises:
        UserError: there is no evaluation in ``folder``.
    """
    report = read_report(folder)
    curves = training_charts(read_log(log)) if log is not None and log.is_file() else []
    make = PAGES.get(report.get("kind"), comparison_page)
    path = folder / "report.html"
    path.write_text(make(report, folder, curves), encoding="utf-8")
    return path


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
    """The numbers, what to know about them, and where the page is, in the terminal."""
    report = read_report(folder)
    table, lines = WORDS.get(report.get("kind"), (summary_table, target_lines))
    console.print(table(report))
    for line in lines(report):
        console.print(line, highlight=False)
    console.print(f"report  {page}", highlight=False, soft_wrap=True)
