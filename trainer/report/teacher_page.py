"""The page of a comparison with the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .blocks import (
    Charts,
    Facts,
    Page,
    PictureColumn,
    PictureGrid,
    PictureGroup,
    Run,
    Section,
    Settings,
    Target,
    target_section,
)
from .findings import findings
from .numbers import counted, listed, number, seconds, share
from .teacher.facts import facts
from .teacher.tables import distance_charts, quality_table, run_groups, run_table

Report = Mapping[str, Any]
SETTINGS = ("inputs", "sampling", "settings", "reference", "environment")  # version 0.1 lacks the first two


LEAD_STEPS = 4  # of the student whose time stands under the title
CURVE = (
    "A student of flash diffusion should gain from every added step, and its training should show against the "
    "undistilled teacher with as many passes. The dashed line is the floor: a second set of the teacher’s own pictures."
)


def teacher_page(report: Report, folder: Path) -> Page:
    """Return the page of a report whose pictures are in ``folder``."""
    groups = run_groups(report)
    legend = tuple(groups[1:])
    name = report["student"] or "Teacher"
    return Page(
        over="Flash Diffusion · evaluation",
        name=name,
        title=_title(report),
        lead=_lead(report),
        notes=tuple(report["notes"]),
        sections=(
            *target_section([target_card(target) for target in report["targets"]]),
            Section(
                "Pictures",
                (picture_grid(report, folder),),
                "One row per prompt; all pictures of a row start from the same noise. These are the first prompts of "
                "the draw, not a selection.",
            ),
            Section(
                "Distance to the teacher, step by step",
                (*findings(report), Charts(distance_charts(report), legend)),
                CURVE if report.get("curve") else "",
            ),
            Section("All runs: distances", (run_table(report),)),
            *_quality_section(report),
        ),
        method=Section(
            "How it was measured",
            (
                Facts(facts(report)),
                Settings({key: report[key] for key in SETTINGS if key in report}),
            ),
        ),
    )


def _title(report: Report) -> str:
    many, students = report["runs"][0], _students(report)
    if not students:
        return f"The teacher in {many['steps']} steps and in fewer"
    return f"{many['nfe']} passes become {listed([run['nfe'] for run in students])}"


def _lead(report: Report) -> str:
    many, students = report["runs"][0], _students(report)
    prompts = report["reference"]["distinct_prompts"]
    drawn = f"{report['settings']['samples']} pictures of {prompts} prompts per run"
    if not students:
        return f"{drawn}; no student was given."
    best = next((run for run in students if run["steps"] == LEAD_STEPS), students[0])
    return (
        f"{report['student']} beside its teacher in {counted(many['steps'], 'step')} with guidance "
        f"{many['guidance']:g}: {drawn}. Time per picture: teacher {seconds(many['seconds_per_image'])}, student in "
        f"{counted(best['steps'], 'step')} {seconds(best['seconds_per_image'])}."
    )


def _quality_section(report: Report) -> tuple[Section, ...]:
    """Return the table of quality; empty in reports of 0.1, whose only table has all figures."""
    return (Section("All runs: quality", (quality_table(report),)),) if "kinds" in report else ()


def _students(report: Report) -> list[Run]:
    return [run for run in report["runs"] if run["name"].startswith("student")]


def target_card(target: Mapping[str, Any]) -> Target:
    """Return a target as a card; reports of earlier versions have targets without a ``kind``, in times."""
    least = "at_least" in target
    limit = target["at_least" if least else "at_most"]
    kind = target.get("kind")
    if kind == "gap":
        value, bound = share(target["value"]), share(limit)
    elif kind == "accuracy":
        value, bound = share(target["value"], 1), share(limit)
    else:
        value, bound = f"{number(target['value'])} ×", f"{limit:g} ×"
    return Target(target["run"], value, target["measure"], f"at {'least' if least else 'most'} {bound}", target["met"])


def picture_grid(report: Report, folder: Path) -> PictureGrid:
    """Return the grid: the teacher, the student, the undistilled teacher with as many passes as the student."""
    files = report["pictures"]["files"]
    return PictureGrid(
        tuple(
            PictureGroup(
                group.title, group.kind, tuple(PictureColumn.of(run, files[run["name"]]) for run in group.runs)
            )
            for group in run_groups(report)
            if group.kind != "guided"
        ),
        tuple(report["pictures"]["prompts"]),
        folder,
        small=True,
    )
