"""The page of a comparison with the teacher."""

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
    Target,
    chart_of,
    sampling_words,
    target_section,
)
from .numbers import capital, counted, listed, number, seconds, share

Report = Mapping[str, Any]
SETTINGS = ("inputs", "sampling", "settings", "reference", "environment")  # version 0.1 lacks the first two
GAP = (
    "(undistilled - student) / (undistilled - floor), and undistilled / student: Fréchet distances of the student and "
    "of the undistilled teacher with as many passes and no guidance. 100 % of the gap closed = as good as the floor."
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
            Section("Distance to the teacher", (Charts(distance_charts(report), legend),)),
            Section("All runs", (run_table(report),)),
        ),
        method=Section(
            "How it was measured",
            (
                Facts(_facts(report)),
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
    best = students[0]
    return (
        f"{report['student']} beside its teacher in {counted(many['steps'], 'step')} with guidance "
        f"{many['guidance']:g}: {drawn}. Time per picture: teacher {seconds(many['seconds_per_image'])}, student in "
        f"{counted(best['steps'], 'step')} {seconds(best['seconds_per_image'])}."
    )


def _students(report: Report) -> list[Run]:
    return [run for run in report["runs"] if run["name"].startswith("student")]


def run_groups(report: Report) -> list[Group]:
    """Return the teacher's many steps, the student, the undistilled teacher without guidance and with guidance."""
    many, *rest = report["runs"]

    def pick(role: str, guided: bool) -> tuple[Run, ...]:
        return tuple(run for run in rest if run["name"].startswith(role) and (run["guidance"] != 1) == guided)

    groups = [
        Group("Teacher", "aim", (many,)),
        Group("Student", "student", pick("student", False)),
        Group("Undistilled teacher, no guidance", "plain", pick("teacher", False)),
        Group("Undistilled teacher, guided", "guided", pick("teacher", True)),
    ]
    return [group for group in groups if group.runs]


def target_card(target: Mapping[str, Any]) -> Target:
    """Return a target as a card; reports of earlier versions have targets without a ``kind``, in times."""
    least = "at_least" in target
    limit = target["at_least" if least else "at_most"]
    is_gap = target.get("kind") == "gap"
    value, bound = (
        (share(target["value"]), share(limit)) if is_gap else (f"{number(target['value'])} ×", f"{limit:g} ×")
    )
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
    )


def run_table(report: Report) -> RunTable:
    """Return the table of all runs."""
    floor = report["floor"]["fd"]
    gaps = {f"student {counted(gap['steps'], 'step')}": gap for gap in report["gaps"]}

    def gap(run: Run, key: str) -> float | None:
        return gaps[run["name"]][key] if run["name"] in gaps else None

    known = any(run["prompt_accuracy"] is not None for run in report["runs"])
    accuracy = [TableColumn("Prompt\naccuracy", "acc.", lambda run: share(run["prompt_accuracy"]))] if known else []
    columns = [
        TableColumn("Run", "run", lambda run: run["name"]),
        TableColumn("Passes", "NFE", lambda run: str(run["nfe"])),
        TableColumn("Fréchet\ndistance", "FD", lambda run: number(run["fd"])),
        TableColumn("× floor", "x floor", lambda run: number(run["fd"] / floor)),
        TableColumn("KID", "KID", lambda run: number(run["kid"])),
        TableColumn("Paired\ndistance", "paired", lambda run: number(run["paired"])),
        *accuracy,
        TableColumn("Diversity", "div.", lambda run: number(run["diversity"])),
        TableColumn("Time per\npicture", "time", lambda run: seconds(run["seconds_per_image"])),
    ]
    if gaps:
        columns[4:4] = [
            TableColumn("Gap\nclosed", "gap", lambda run: share(gap(run, "closed"))),
            TableColumn("Times\ncloser", None, lambda run: number(gap(run, "times_closer"))),
        ]
    return RunTable(tuple(columns), tuple(run_groups(report)), f"Distance to the teacher; floor {number(floor)}")


def distance_charts(report: Report) -> tuple[Any, ...]:
    """Return the charts of the distances against passes: of the distributions, and of pairs of pictures."""
    many, groups = report["runs"][0], run_groups(report)[1:]
    return (
        chart_of(
            groups,
            lambda run: run["fd"],
            "Fréchet distance",
            "Distance between a run’s pictures and the teacher’s pictures as a whole. A second set of the teacher’s "
            "own pictures scores the floor.",
            level=report["floor"]["fd"],
            level_name="floor: the teacher against itself",
        ),
        chart_of(
            groups,
            lambda run: run["paired"],
            "Paired distance",
            "Mean distance between a picture and the teacher’s picture for the same prompt and noise; 0 = the same "
            "picture.",
            level=many["diversity"],
            level_name="two teacher pictures of one prompt",
        ),
    )


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    many, reference, where = report["runs"][0], report["reference"], report["environment"]
    stored = (
        " The sets are stored as features; the teacher’s pictures above were made again and agree with them."
        if reference["stored"]
        else ""
    )
    return (
        *_input_facts(report),
        (
            "Reference",
            f"Two sets of the teacher’s pictures in {counted(many['steps'], 'step')} with guidance "
            f"{many['guidance']:g}, in uncond + w (cond - uncond): {reference['samples'] * reference['times']} and "
            f"{reference['samples']} pictures of the same prompts with independent noise. Every run starts from the "
            f"noise of the second set.{stored}",
        ),
        (
            "Fréchet distance, KID",
            "Between a run’s pictures and the first set, whose noise the run has never seen. The second set scores the "
            f"floor, {number(report['floor']['fd'])}: a perfect student scores the floor, not 0.",
        ),
        *([("Gap closed, times closer", GAP)] if report["gaps"] else []),
        (
            "Paired distance",
            "Mean distance between a picture and the second set’s picture of the same prompt and noise. Two teacher "
            f"pictures of one prompt lie {number(many['diversity'])} apart.",
        ),
        ("Prompt accuracy", _accuracy(report)),
        (
            "Diversity",
            "Mean distance between pictures of one prompt. A value far below the teacher’s would be a collapse.",
        ),
        (
            "Passes, time",
            "Forward passes of the network per picture; guidance needs two per step. Seconds include text encoder and "
            f"decoder, on {where['device']} with {counted(where['threads'], 'thread')}. The teacher is timed on the "
            "pictures above.",
        ),
    )


def _input_facts(report: Report) -> tuple[tuple[str, str], ...]:
    """Return where the captions and the features come from, and the samplers; reports of 0.1 lack these."""
    if "inputs" not in report:
        return ()
    inputs = report["inputs"]
    return (
        ("Captions", f"{capital(inputs['captions'])}."),
        (
            "Features",
            f"{capital(inputs['features'])}, {inputs['dimensions']} numbers a picture. Fréchet distances are usable "
            f"from {inputs['samples_needed']} pictures a run on.",
        ),
        ("Sampling", sampling_words(report["sampling"])),
    )


def _accuracy(report: Report) -> str:
    if report["runs"][0]["prompt_accuracy"] is None:
        return "Not measured: the feature network does not know what these prompts name."
    known = report.get("inputs", {}).get("known_prompts")
    samples = report["settings"]["samples"]
    some = f", of the {known} pictures of {samples} whose prompt it knows" if known not in (None, samples) else ""
    return f"Share of pictures that the feature network classifies as the thing in their prompt{some}."
