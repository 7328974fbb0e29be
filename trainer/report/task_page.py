"""The page of an evaluation on a conditional task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .blocks import (
    Cell,
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
from .findings import findings
from .numbers import capital, counted, listed, number, seconds, signed

Report = Mapping[str, Any]
Figure = Mapping[str, Any]  # one of the ``figures`` of report.json
SETTINGS = ("inputs", "sampling", "settings", "origin", "environment")  # version 0.1 lacks the first two
TARGETS = (
    "Set distances alone are judged: the Fréchet distance over the teacher’s own (two sets of its own pictures) is at "
    "most 1.05, 1.15 and 1.4 at 4, 2 and 1 steps; and at 2 and 1 steps it is clearly below the undistilled teacher’s "
    "with as many passes: the 95 % interval of the difference on the same samples is above 0. Figures of single "
    "pictures reward blur: the mean of all answers is near every answer. They are shown, and judge nothing."
)
GRID_STEPS = 4  # of the undistilled teacher's pictures in the grid


def task_page(report: Report, folder: Path) -> Page:
    """Return the page of a report whose pictures are in ``folder``."""
    groups = run_groups(report)
    figures = {figure["key"]: figure for figure in report["figures"]}
    put_back = " Results are shown put back into their pictures." if report["put_back"] else ""
    return Page(
        over=f"Flash Diffusion · {report['task']}",
        name=f"{report['student'] or report['teacher']}, {report['task']}",
        title=_title(report),
        lead=_lead(report),
        notes=tuple(report["notes"]),
        sections=(
            *target_section([target_card(target, figures[target["figure"]]) for target in report["targets"]]),
            Section(
                "Pictures",
                (picture_grid(report, folder),),
                "One row per set of conditions, with one caption and one initial noise. These are the first samples of "
                f"the draw, not a selection.{put_back}",
            ),
            Section(
                "Figures",
                (
                    Facts(tuple((figure["title"], _meaning(figure)) for figure in report["figures"])),
                    *findings(report),
                    Charts(figure_charts(report), tuple(group for group in groups if group.lines)),
                ),
            ),
            Section("All runs", (run_table(report),)),
            *_comparison_section(report),
        ),
        method=Section(
            "How it was measured",
            (Facts(_facts(report)), Settings({key: report[key] for key in SETTINGS if key in report})),
        ),
    )


def _title(report: Report) -> str:
    many, students = _many(report), [run["nfe"] for run in report["runs"] if run["role"] == "student"]
    if not students:
        return f"The teacher in {many['steps']} steps and in fewer"
    return f"{many['nfe']} passes become {listed(students)}"


def _lead(report: Report) -> str:
    many, samples = _many(report), f"{_samples(report)} per run, from {report['origin']['data']}"
    if not report["student"]:
        return f"{capital(report['task'])}: {samples}; no student was given."
    guided = f" with guidance {many['guidance']:g}" if many["guidance"] != 1 else ""
    steps = counted(many["steps"], "step")
    return f"{report['student']} beside its teacher in {steps}{guided}, on {report['task']}: {samples}."


def _samples(report: Report) -> str:
    """Return the number of samples in words: "256 samples", "3 sets of 256 samples"."""
    sets = _sets(report)
    return f"{f'{sets} sets of ' if sets > 1 else ''}{report['settings']['samples']} samples"


def _sets(report: Report) -> int:
    """Return the number of sets of samples, each from its own seed."""
    return int(report["settings"].get("seeds", 1))


def _many(report: Report) -> Run:
    return next(run for run in report["runs"] if run["name"] == report["many"])


def _direction(figure: Figure) -> str:
    return "Higher" if figure["higher_is_better"] else "Lower"


def _meaning(figure: Figure) -> str:
    unit = f", in {figure['unit']}" if figure["unit"] else ""
    return f"{_direction(figure)} is better{unit}. {figure['meaning']}"


def run_groups(report: Report) -> list[Group]:
    """Return the yardsticks, the student, the undistilled teacher without guidance and with guidance."""
    many = _many(report)

    def pick(role: str, guided: bool = False) -> tuple[Run, ...]:
        return tuple(
            run
            for run in report["runs"]
            if run["role"] == role and run is not many and (run["guidance"] != 1) == guided
        )

    without = tuple(run for run in report["runs"] if run["role"] == "without")
    groups = [
        Group("Yardsticks", "aim", (*pick("original"), many, *without), lines=False),
        Group("Student", "student", pick("student")),
        Group("Undistilled teacher, no guidance", "plain", pick("teacher")),
        Group("Undistilled teacher, guided", "guided", pick("teacher", guided=True)),
    ]
    return [group for group in groups if group.runs]


def picture_grid(report: Report, folder: Path) -> PictureGrid:
    """Return the grid: the conditions, then the results; of the undistilled teacher only the run in 4 steps."""
    pictures, files = report["pictures"], report["pictures"]["files"]
    given = [PictureColumn(title, (), tuple(drawn)) for title, drawn in pictures["drawn"].items()]
    original = PictureColumn("original", (), tuple(pictures["original"]))
    groups = [PictureGroup("Given", "aim", (*given, original))]
    for group in run_groups(report):
        runs = [run for run in group.runs if run["role"] != "original"]
        if group.kind in ("plain", "guided"):
            runs = [run for run in runs if run["steps"] == GRID_STEPS]
        title = {"aim": "Teacher", "plain": "No guidance", "guided": "Guided"}.get(group.kind, group.title)
        columns = []
        for run in runs:
            column = PictureColumn.of(run, files[run["name"]])
            head = "without" if run["role"] == "without" else column.title
            columns.append(PictureColumn(head, column.notes, column.files))
        if columns:
            groups.append(PictureGroup(title, group.kind, tuple(columns)))
    prompts = tuple(prompt or f"no. {row + 1}" for row, prompt in enumerate(pictures["prompts"]))
    return PictureGrid(tuple(groups), prompts, folder, small=True)


def figure_charts(report: Report) -> tuple[Any, ...]:
    """Return a chart of every figure against passes."""
    many, groups = _many(report), run_groups(report)
    charts = []
    for figure in report["figures"]:
        level = many["figures"][figure["key"]]["value"]
        if level is None:
            continue
        charts.append(
            chart_of(
                groups,
                _value_of(figure["key"]),
                figure["title"],
                f"{_direction(figure)} is better{', in ' + figure['unit'] if figure['unit'] else ''}.",
                level=level,
                level_name=f"teacher, {counted(many['steps'], 'step')}",
                log=figure["key"].startswith("fd"),
                short=figure["short"],
            )
        )
    return tuple(charts)


def _value_of(key: str) -> Callable[[Run], float | None]:
    return lambda run: run["figures"][key]["value"]


def run_table(report: Report) -> RunTable:
    """Return the table of all runs; in the terminal ``high`` or ``low`` under a figure says which is better."""

    def column(figure: Figure) -> TableColumn:
        unit = f",\n{figure['unit']}" if figure["unit"] else ""
        better = "high" if figure["higher_is_better"] else "low"
        short = f"{figure['short']}\n{better}"
        return TableColumn(f"{figure['short']}{unit}", short, _interval_cell(figure["key"]), better)

    columns = (
        TableColumn("Run", "run", lambda run: run["name"]),
        TableColumn("Passes", None, lambda run: str(run["nfe"]) if run["nfe"] else "–"),
        *(column(figure) for figure in report["figures"]),
        TableColumn("Time per\npicture", "time", lambda run: seconds(run["seconds_per_image"])),
    )
    return RunTable(
        columns,
        tuple(run_groups(report)),
        f"{report['task']}, {_samples(report)}; high, low: the better direction",
    )


def _interval_cell(key: str) -> Callable[[Run], Cell]:
    """Return a figure with its interval and, where there are several sets, its standard deviation over them."""

    def cell(run: Run) -> Cell:
        found = run["figures"][key]
        below = "" if found["low"] is None else f"{number(found['low'])} … {number(found['high'])}"
        spread = run.get("seeds", {}).get("deviations", {}).get(key)
        below = below if spread is None else f"{below}; ± {number(spread)}"
        return Cell(number(found["value"]), below)

    return cell


def _comparison_section(report: Report) -> tuple[Section, ...]:
    """Return each of the student's runs beside the undistilled teacher's; empty where there is no student."""
    lines = {(line["run"], line["rival"], line["figure"]): line for line in report["comparisons"]}
    if not lines:
        return ()
    nfe = {run["name"]: run["nfe"] for run in report["runs"]}
    pairs = dict.fromkeys((run, rival) for run, rival, _ in lines)
    rows = tuple({"name": f"{run} against {rival}", "pair": (run, rival), "nfe": nfe[run]} for run, rival in pairs)

    def column(figure: Figure) -> TableColumn:
        def cell(row: Run) -> Cell:
            line = lines[(*row["pair"], figure["key"])]
            if line["value"] is None:
                return Cell("–")
            text = "no clear difference" if line["verdict"] == "even" else line["verdict"]
            below = f"{signed(line['value'])} ({signed(line['low'])} … {signed(line['high'])})"
            return Cell(text, below, line["verdict"])

        unit = f", {figure['unit']}" if figure["unit"] else ""
        return TableColumn(f"{figure['short']}{unit}", None, cell)

    columns = (
        TableColumn("Run and rival", None, lambda row: row["name"]),
        TableColumn("Passes", None, lambda row: str(row["nfe"])),
        *(column(figure) for figure in report["figures"]),
    )
    return (
        Section(
            "The student against the undistilled teacher with as many passes",
            (RunTable(columns, (Group("", "", rows),)),),
            "How much better the student is on the same samples, with the 95 % interval. “Better” and “worse” stand "
            "only where the whole interval is on one side of 0.",
        ),
    )


def target_card(target: Mapping[str, Any], figure: Figure) -> Target:
    """Return a target as a card."""
    if target["kind"] == "better":
        unit = f" {figure['unit']}" if figure["unit"] else ""
        measure = f"better in {figure['title']} than {target['rival']} without guidance"
        limit = f"95 % interval above 0{unit}; it is {signed(target['low'])} … {signed(target['high'])}"
        return Target(target["run"], signed(target["value"]), measure, limit, target["met"])
    value = "–" if target["value"] is None else f"{number(target['value'])} ×"
    limit = f"at most {target['at_most']:g} ×" if "at_most" in target else f"at least {target['at_least']:g} ×"
    measure = f"times the {figure['title']} of {target['rival']}"
    return Target(target["run"], value, measure, limit, target["met"])


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    where = report["environment"]
    return (
        (
            "Data",
            f"{capital(report['origin']['data'])}. Conditions are drawn anew from their own seed. Where there are "
            "fewer pictures than samples, a picture comes again with other conditions.",
        ),
        (
            "Runs",
            "All runs share conditions, captions and the initial noise of each sample. The student uses the few-step "
            "sampler without guidance; the teacher solves its ODE with guidance w in uncond + w (cond - uncond). “The "
            "originals” are the data’s own pictures after the autoencoder: the best that any denoiser could reach.",
        ),
        *_input_facts(report),
        *([("Targets", TARGETS)] if report["targets"] else []),
        (
            "Intervals",
            "95 %, on the same samples for all runs. Means: the bootstrap. Distances of sets: the delete-half "
            "jackknife, that is the spread over random halves of the samples, put around the distance of all samples.",
        ),
        *_set_facts(report),
        (
            "Passes, time",
            "Forward passes of the network per picture; guidance needs two per step. Seconds include network and "
            f"decoder, on {where['device']} with {counted(where['threads'], 'thread')}.",
        ),
    )


def _set_facts(report: Report) -> tuple[tuple[str, str], ...]:
    """Return how several sets of samples are put together; empty for one set."""
    if _sets(report) == 1:
        return ()
    first = report["settings"]["seed"]
    return (
        (
            "Sets",
            f"{_sets(report)} sets of samples, of seeds {first} to {first + _sets(report) - 1}, each with its own "
            "noise and, where conditions are drawn, its own conditions. All draw from the same pictures, so intervals "
            "hold for these pictures. Figures are means over the sets, ± is the standard deviation of a set. Distances "
            "are measured in each set by itself; a ratio of distances is that of their means.",
        ),
    )


def _input_facts(report: Report) -> tuple[tuple[str, str], ...]:
    """Return where the features come from, and how pictures were sampled; reports of version 0.1 lack these."""
    if "inputs" not in report:
        return ()
    inputs = report["inputs"]
    return (
        ("Features", f"{capital(inputs['features'])}, {inputs['dimensions']} numbers a picture."),
        ("Sampling", sampling_words(report["sampling"])),
    )
