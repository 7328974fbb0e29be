"""Distil one small teacher many times, one setting changed at a time, and write a table of the distances.

    python -m benchmarks.ablations glyphs --output out/ablations --seeds 3
    python -m benchmarks.ablations glyphs --output out/ablations --rows MSE "K = 4"

The rows are in ``ablations.yaml``. Each is a whole run of ``flash-diffusion distill`` and ``evaluate``; its folder
keeps recipe, log, LoRA and report. Runs with the same trajectories of the teacher share them. A finished run is not
made again, so a stopped benchmark goes on where it stopped. ``--chart FILE.svg`` draws the distances (matplotlib).
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from flash_diffusion.trainer.config import MethodSection
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.distill.passes import update_passes, warmup_passes
from flash_diffusion.trainer.recipes import load_recipe
from flash_diffusion.trainer.recipes.merging import merged

ROWS = Path(__file__).with_suffix(".yaml")
REFERENCE_STEPS = 32  # of the teacher that the students are compared with
STEPS = (1, 2, 4, 8)
OTHERS = ("states", "random")  # kinds of features that have columns for 1 and 2 steps
DISTANCES = ("1 step", "2", "4", "8", "States at 1", "States at 2", "Random at 1", "Random at 2")
HEAD = ("Row", *DISTANCES, "Diversity at 1", "Accuracy at 1", "Sharpness at 1", "Passes a sample")
# The chart's step counts: label, colour (told apart by the colour-blind too) and marker.
MARKS = {
    "8": ("8 steps", "#0072b2", "s"),
    "4": ("4 steps", "#009e73", "^"),
    "2": ("2 steps", "#e69f00", "D"),
    "1 step": ("1 step", "#d55e00", "o"),
}
FARTHEST = 40  # multiples of the floor that the chart shows
ROW_INCHES = 0.19  # height of a row of the chart
TITLE_ROWS = 2  # height of a panel's title and margins, in rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """A row of the table, with its recipe's fields on top of the teacher's recipe."""

    group: str
    name: str
    content: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """A name for its folder: the group's and the row's, in letters, digits and dashes."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.group} {self.name}".lower()).strip("-")


def read_rows(path: Path = ROWS) -> list[Row]:
    """Return the rows of a file such as ``ablations.yaml``."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        Row(group["title"], row["name"], _recipe(content["common"], group, row))
        for group in content["groups"]
        for row in group["rows"]
    ]


def _recipe(common: Mapping[str, Any], group: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    fields = merged(merged(common, group.get("fields", {})), row.get("fields", {}))
    first, second = fields["phases"]
    return {**fields, "phases": [first, {**second, **group.get("second", {}), **row.get("second", {})}]}


def run(row: Row, teacher: str, seed: int, output: Path) -> Path:
    """Distil and evaluate a row with one seed, where that is not done yet; return the report's path."""
    folder = output / f"seed-{seed}" / row.folder
    report = folder / "report" / "report.json"
    if report.is_file():
        return report
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"extends": teacher, "seed": seed, **row.content}, sort_keys=False))
    recipe = load_recipe(str(file))
    _share_trajectories(folder / "run", output / f"seed-{seed}" / "trajectories", recipe.method)
    distil(recipe, folder / "run", resume=True)
    guidance = statistics.fmean(load_recipe(teacher).method.guidance)
    command = [sys.executable, "-m", "flash_diffusion.trainer", "evaluate", "--run", str(folder / "run")]
    command += ["--steps", str(REFERENCE_STEPS), "--guidance", f"{guidance:g}", "--output", str(report.parent)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return report


def _share_trajectories(run_folder: Path, shared: Path, method: MethodSection) -> None:
    """Let the run keep its trajectories in a folder for all runs with the same solver, steps and guidance."""
    low, high = method.guidance
    folder = shared / f"{method.solver}-{method.teacher_steps}-{low:g}-{high:g}"
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.mkdir(exist_ok=True)
    link = run_folder / "trajectories"
    if not link.exists():
        link.symlink_to(folder.resolve(), target_is_directory=True)


def figures(report: Path) -> dict[str, float]:
    """Return a run's figures by the head of their column."""
    runs = {run["name"]: run for run in json.loads(report.read_text(encoding="utf-8"))["runs"]}
    student = {steps: runs[f"student {steps} step{'s' if steps > 1 else ''}"] for steps in STEPS}
    teacher = next(run for run in runs.values() if run["steps"] == REFERENCE_STEPS)
    shown = [("features", steps) for steps in STEPS] + [(kind, steps) for kind in OTHERS for steps in STEPS[:2]]
    values = [student[steps]["kinds"][kind]["x_floor"]["value"] for kind, steps in shown]
    one = student[1]
    values += [one["diversity"] / teacher["diversity"], 100 * one["prompt_accuracy"], one["sharpness"]]
    return dict(zip(HEAD[1:-1], values, strict=True))


def table(rows: Sequence[Row], made: Mapping[str, Sequence[Mapping[str, float]]], teacher: str) -> Iterator[str]:
    """Yield the lines of the table in Markdown: means over the seeds, with the standard deviation at one step."""
    group = ""
    for row in rows:
        if not (sets := made.get(row.folder)):
            continue
        if row.group != group:
            group = row.group
            yield from ("", f"### {group}", "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD))
        cells = [statistics.fmean(each[column] for each in sets) for column in HEAD[1:-1]]
        first = f"{cells[0]:.2f}"
        if len(sets) > 1:
            first += f" ± {statistics.stdev(each[HEAD[1]] for each in sets):.2f}"
        *rest, accuracy, sharpness = cells[1:]
        texts = [first, *(f"{value:.2f}" for value in rest), f"{accuracy:.1f} %", f"{sharpness:.2f}"]
        yield f"| {row.name} | {' | '.join(texts)} | {_passes(row, teacher):.1f} |"


def _passes(row: Row, teacher: str) -> float:
    """Return the network passes of an update for one sample: the run's mean, without recording trajectories."""
    recipe = load_recipe(teacher)
    recipe = type(recipe).model_validate(merged(recipe.model_dump(mode="json"), row.content))
    samples = recipe.batch_size * recipe.gradient_accumulation
    total = sum(sum(update_passes(recipe, phase).values()) * phase.updates for phase in recipe.phases)
    total += warmup_passes(recipe, recipe.phases[-1])
    return total / samples / recipe.updates


def chart(rows: Sequence[Row], made: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw the distances of all rows, a panel for each group, and lines at those of the first row; write an SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = [
        (title, list(group)) for title, group in groupby((r for r in rows if r.folder in made), lambda r: r.group)
    ]
    heights = [len(group) + TITLE_ROWS for _, group in groups]
    base = made.get(rows[0].folder)
    with rc_context({"svg.hashsalt": "ablations", "svg.fonttype": "none", "font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(8, ROW_INCHES * sum(heights)), layout="constrained")
        panels = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (title, group) in zip(panels, groups, strict=True):
            names = [row.name for row in group]
            for column, (label, colour, marker) in MARKS.items():
                values = [statistics.fmean(each[column] for each in made[row.folder]) for row in group]
                shown = [min(value, FARTHEST) for value in values]
                panel.scatter(shown, names, label=label, color=colour, marker=marker, s=22, zorder=3)
                if base:
                    level = statistics.fmean(each[column] for each in base)
                    panel.axvline(level, color=colour, linewidth=0.8, linestyle=":")
            panel.set(title=title, xscale="log", xlim=(0.9, FARTHEST * 1.1))
            panel.set_xticks([1, 1.5, 2, 3, 5, 10, 20, 40], ["1", "1.5", "2", "3", "5", "10", "20", "40"])
            panel.minorticks_off()
            panel.grid(axis="y", linewidth=0.4)
            panel.set_ylim(len(group) - 0.5, -0.5)  # the first row above
        panels[0].legend(ncols=len(MARKS), loc="lower right", bbox_to_anchor=(1, 1.15), frameon=False)
        panels[-1].set_xlabel(f"Fréchet distance / floor; dotted: {rows[0].name}; {FARTHEST} stands for all above")
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="the recipe of the teacher: glyphs or demo")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", help="names of rows, or words in them (default: all)")
    parser.add_argument("--table", type=Path, help="Markdown file to write (default: print)")
    parser.add_argument("--chart", type=Path, help="SVG file to draw the distances into")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    output = args.output / args.teacher
    rows = read_rows()
    wanted = [row for row in rows if not args.rows or any(word in f"{row.group}: {row.name}" for word in args.rows)]
    for seed in range(args.seeds):
        for number, row in enumerate(wanted, 1):
            logger.info("seed %d, row %d of %d: %s", seed, number, len(wanted), row.name)
            run(row, args.teacher, seed, output)
    made: dict[str, list[dict[str, float]]] = {}
    for report in sorted(output.glob("seed-*/*/report/report.json")):
        made.setdefault(report.parents[1].name, []).append(figures(report))
    text = "\n".join(table(rows, made, args.teacher)).strip() + "\n"
    if args.chart:
        chart(rows, made, args.chart)
    if args.table:
        args.table.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
