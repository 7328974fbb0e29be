"""The command ``flash-diffusion data check``: everything that is wrong with a data set, at once."""

from __future__ import annotations

import argparse
import json
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import DataSection, TaskSection, explain
from ...errors import UserError

if TYPE_CHECKING:
    from .findings import Finding, Findings

RESOLUTION = 512  # pixels, Stable Diffusion 1.5's
SHEET_SAMPLES = 120
EXIT_CODES = "Exit code: 0 = nothing is wrong, 1 = only warnings, 2 = errors, with which training would stop."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EXIT_CODES
    parser.add_argument(
        "path", nargs="*", help="a folder of pictures; shards, folders of shards, patterns or URLs of shards; prompts"
    )
    parser.add_argument("--source", help="data.source (default: told by the path: folder, webdataset or prompts)")
    parser.add_argument("--task", metavar="NAME", help="the task to train: check the companions that it reads")
    parser.add_argument(
        "--resolution", type=int, default=RESOLUTION, metavar="N", help=f"data.resolution (default: {RESOLUTION})"
    )
    parser.add_argument("--buckets", action="store_true", help="data.buckets: aspect ratios are kept")
    parser.add_argument("--caption-field", metavar="NAME", help="data.caption_field")
    parser.add_argument("--limit", type=int, metavar="N", help="look only at the first N samples")
    parser.add_argument("--model", metavar="FOLDER", help="a diffusers folder, whose tokenizers count captions' tokens")
    parser.add_argument("--sheet", type=Path, metavar="FILE.html", help="write a page of samples as training sees them")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Check the data, print what was found, and return the exit code."""
    from .inspection import Inspection
    from .sheet import write_sheet
    from .tokens import is_longer

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # captions may hold letters that the console lacks
    data = _section(args)
    longer, counted = is_longer(args.model)
    inspection = Inspection(data, args.resolution, _companions(args.task), longer, SHEET_SAMPLES if args.sheet else 0)
    findings = inspection.run(_progress)
    if "long caption" in findings.found:
        findings.notes.append(f"Lengths of captions are {counted}.")
    if args.sheet:
        write_sheet(args.sheet, findings, inspection.shown(), args.resolution)
    if args.json:
        sys.stdout.write(json.dumps(findings.as_json(), indent=2) + "\n")
    else:
        _print(findings, args.sheet)
    return findings.exit_code


def _section(args: argparse.Namespace) -> DataSection:
    from pydantic import ValidationError

    from ..reading import source_of

    if not args.path and not (args.source or "").startswith("demo"):
        raise UserError("there is no path; give a folder of pictures, shards or prompts, or --source demo")
    source = args.source or source_of(args.path[0])
    path = args.path[0] if len(args.path) == 1 else args.path or None
    fields = {"source": source, "path": path, "resolution": args.resolution, "limit": args.limit}
    try:
        return DataSection.model_validate({**fields, "buckets": args.buckets, "caption_field": args.caption_field})
    except ValidationError as error:
        raise UserError("\n".join(("these options don't fit:", *explain(error, ("data",))))) from error


def _companions(task: str | None) -> tuple[str, ...] | None:
    if task is None:
        return None
    from ...tasks import build_task

    return build_task(TaskSection(name=task)).companions


def _progress(done: int) -> None:
    if done % 1000 == 0:
        sys.stderr.write(f"{done} samples\n")


def _print(findings: Findings, sheet: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{escape(findings.title)}[/bold]: {findings.samples} samples can be used")
    for name, value in findings.facts.items():
        console.print(f"  {name}: {escape(str(value))}", highlight=False)
    if findings.exit_code == 0:
        console.print("Nothing is wrong.")
    else:
        table = Table("", "cases", "what", "what to do", show_lines=True)
        for finding in (*findings.of("error"), *findings.of("warning")):
            table.add_row(
                *(escape(cell) for cell in _cells(finding)), style="red" if finding.severity == "error" else ""
            )
        console.print(table)
    for note in findings.notes:
        console.print(escape(note), highlight=False)
    if sheet is not None:
        console.print(f"The contact sheet is {escape(str(sheet))}.", highlight=False)


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    cases: list[Any] = finding.cases[:5]
    if finding.count > len(cases) and finding.kind != "not read":
        cases = [*cases, "..."]
    return finding.severity, str(finding.count), "\n".join((f"{finding.title}:", *cases)), finding.advice
