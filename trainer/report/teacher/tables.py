"""The tables and the charts of a comparison with the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..blocks import Cell, Group, Run, RunTable, TableColumn, chart_of
from ..numbers import counted, interval, number, seconds, share

Report = Mapping[str, Any]
SHORT_TITLES = {"features": "feature network", "states": "teacher’s states", "random": "random features"}
SHORT = {"features": "", "states": "\nstates", "random": "\nrandom"}  # heads of the kinds of features


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


def run_table(report: Report) -> RunTable:
    """Return the table of the distances of all runs; reports of 0.1 have all figures in it."""
    floor = report["floor"]["fd"]
    gaps = {f"student {counted(gap['steps'], 'step')}": gap for gap in report["gaps"]}

    def closed(run: Run) -> float | None:
        return gaps[run["name"]]["closed"] if run["name"] in gaps else None

    columns = [
        TableColumn("Run", "run", lambda run: run["name"]),
        TableColumn("Passes", "NFE", lambda run: str(run["nfe"])),
        TableColumn("Fréchet\ndistance", "FD", _kind_cell("features", "fd", lambda run: run["fd"]), "low"),
        TableColumn("× floor", "x floor", _kind_cell("features", "x_floor", lambda run: run["fd"] / floor), "low"),
        *_other_kinds(report),
    ]
    if gaps:
        columns.append(TableColumn("Gap\nclosed", "gap", lambda run: share(closed(run)), "high"))
    columns.append(TableColumn("KID", "KID", _cell(report, "kid"), "low"))
    if "kinds" not in report:
        columns += _quality_columns(report)
    return RunTable(tuple(columns), tuple(run_groups(report)), f"Distance to the teacher; floor {number(floor)}")


def quality_table(report: Report) -> RunTable:
    """Return the table of the other figures of all runs."""
    columns = (TableColumn("Run", "run", lambda run: run["name"]), *_quality_columns(report))
    return RunTable(columns, tuple(run_groups(report)), "Quality; sharpness and contrast: 1 = the teacher's")


def _quality_columns(report: Report) -> list[TableColumn]:
    """Return the columns of the figures that were measured."""
    titles = {
        "paired": ("Paired\ndistance", "paired"),
        "precision": ("Precision", "prec."),
        "recall": ("Recall", "recall"),
        "diversity": ("Diversity", "div."),
        "prompt_accuracy": ("Prompt\naccuracy", "acc."),
        "sharpness": ("Sharpness", "sharp"),
        "contrast": ("Contrast", "contr."),
        "preference": ("Preference", "pref."),
    }
    shares = {"precision", "recall", "prompt_accuracy"}
    near_one, low = {"sharpness", "contrast"}, {"paired"}
    columns = [
        TableColumn(
            title,
            short,
            _cell(report, key, share if key in shares else number),
            "" if key in near_one else "low" if key in low else "high",
        )
        for key, (title, short) in titles.items()
        if any(run.get(key) is not None for run in report["runs"])
    ]
    return [*columns, TableColumn("Time per\npicture", "time", lambda run: seconds(run["seconds_per_image"]))]


def _other_kinds(report: Report) -> list[TableColumn]:
    """Return distance / floor in the kinds of features beside the feature network."""
    return [
        TableColumn(
            f"× floor,\n{kind} features" if kind == "random" else f"× floor,\nteacher’s {kind}",
            f"x floor{SHORT[kind]}",
            _kind_cell(kind, "x_floor"),
            "low",
        )
        for kind in report.get("kinds", ())
        if kind != "features"
    ]


def _cell(report: Report, key: str, write: Callable[[float | None], str] = number) -> Callable[[Run], Cell]:
    """Return a figure with the spread over seeds where there are several, else with its interval."""

    def cell(run: Run) -> Cell:
        spread = run.get("seeds", {}).get("deviations", {}).get(key)
        below = f"± {write(spread)}" if spread is not None else interval(run.get("intervals", {}).get(key), write)
        return Cell(write(run[key]), below)

    return cell


def _kind_cell(kind: str, key: str, plain: Callable[[Run], float] | None = None) -> Callable[[Run], Cell]:
    """Return a distance in a kind of features, or its ratio to the floor; ``plain`` is its value in reports of 0.1."""

    def cell(run: Run) -> Cell:
        if "kinds" not in run:
            return Cell(number(plain(run) if plain is not None else None))
        spreads = run["seeds"]["deviations"]
        spread = spreads.get(f"x_floor_{kind}" if key == "x_floor" else key)
        found = run["kinds"][kind][key]
        is_floor = key == "x_floor" and found["low"] == found["high"]
        below = f"± {number(spread)}" if spread is not None else "" if is_floor else interval(found)
        return Cell(number(found["value"]), below)

    return cell


def distance_charts(report: Report) -> tuple[Any, ...]:
    """Return the charts against passes: distance / floor in each kind of features, and the paired distance."""
    many, groups = report["runs"][0], run_groups(report)[1:]
    floor = report["floor"]["fd"]
    charts = [
        chart_of(
            groups,
            _times_floor(kind, floor),
            f"Fréchet distance / floor: {SHORT_TITLES[kind]}",
            f"In {title}. 1 = as near as a second set of the teacher’s own pictures.",
            level=1.0,
            level_name="floor: the teacher against itself",
            short="x floor",
        )
        for kind, title in report.get("kinds", {"features": "the feature network"}).items()
    ]
    charts.append(
        chart_of(
            groups,
            lambda run: run["paired"],
            "Paired distance",
            "Mean distance between a picture and the teacher’s picture for the same prompt and noise; 0 = the same "
            "picture. Not a goal: fresh noise makes another picture, not a worse one.",
            level=many["diversity"],
            level_name="two teacher pictures of one prompt",
        )
    )
    return tuple(charts)


def _times_floor(kind: str, floor: float) -> Callable[[Run], float]:
    def value(run: Run) -> float:
        found: float = run["kinds"][kind]["x_floor"]["value"] if "kinds" in run else run["fd"] / floor
        return found

    return value
