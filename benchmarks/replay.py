"""How often to use a trajectory: one small teacher distilled at equal passes of the network, for several uses.

    python -m benchmarks.replay --output out/replay                       # distil, evaluate, print the table
    python -m benchmarks.replay --output out/replay --reuse 4             # one row, for several processes side by side
    python -m benchmarks.replay --output out/equal --updates 200          # equal updates instead of equal passes

A run with few uses spends its passes on new trajectories, a run with many uses on updates. The row "first" records all
trajectories before training, and replaces none; it uses each as often as ``FIRST_USES`` says. A finished run is not
made again, so a stopped benchmark goes on where it stopped. CPU seconds are those of training in one thread, of the
session that ended it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flash_diffusion.trainer.config import Recipe
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.distill.passes import recorded_trajectories, trajectory_passes, update_passes
from flash_diffusion.trainer.recipes import load_recipe

from .ablations import HEAD, REFERENCE_STEPS, STEPS, figures

USES = (1, 2, 4, 8, 16)
FIRST_USES = 8
FACTS = "facts.json"


def total_passes(recipe: Recipe) -> float:
    """Return the passes of a whole run."""
    updates = sum(
        phase.updates * sum(value for name, value in update_passes(recipe, phase).items() if name != "trajectories")
        for phase in recipe.phases
    )
    return updates + recorded_trajectories(recipe) * trajectory_passes(recipe.method)


def recipe_of(teacher: str, row: str, bank: int, work: float | int, fields: list[str]) -> Recipe:
    """Return the recipe of a row.

    Args:
        row: uses of a trajectory, or ``first``.
        bank: trajectories held at once.
        work: an int is the number of updates; a float is the number of passes, and the row gets as many updates as
            they allow.
    """
    base = load_recipe(teacher)

    def with_updates(updates: int) -> Recipe:
        count = bank if row != "first" else max(base.trajectories.batch, updates * base.batch_size // FIRST_USES)
        modes = list(base.phases[0].modes)  # the distillation alone: later phases of the recipe have more terms
        phases = f"phases=[{{name: all modes, updates: {updates}, modes: {modes}}}]"
        given = [phases, f"trajectories.count={count}", *fields]
        return load_recipe(teacher, given if row == "first" else [*given, f"trajectories.reuse={row}"])

    if isinstance(work, int):
        return with_updates(work)
    most = int(work / base.batch_size)
    too_many = bisect_right(range(1, most), work, key=lambda updates: total_passes(with_updates(updates))) + 1
    return with_updates(max(1, too_many - 1))


def run(teacher: str, row: str, args: argparse.Namespace) -> None:
    """Distil and evaluate a row, where that is not done yet, and keep its facts."""
    folder = args.output / row
    if (folder / FACTS).is_file():
        return
    recipe = recipe_of(teacher, row, args.bank, args.updates or args.passes, args.set)
    began, cpu = time.monotonic(), time.process_time()
    lora = distil(recipe, folder / "run", resume=True)
    facts: dict[str, Any] = {
        "updates": recipe.updates,
        "trajectories": recorded_trajectories(recipe),
        "passes": total_passes(recipe),
        "cpu_seconds": time.process_time() - cpu,
        "seconds": time.monotonic() - began,
    }
    guidance = sum(recipe.method.guidance) / 2
    command = [sys.executable, "-m", "flash_diffusion.trainer", "evaluate", "--run", str(lora.parent)]
    command += ["--steps", str(REFERENCE_STEPS), "--guidance", f"{guidance:g}", "--output", str(folder / "report")]
    subprocess.run([*command, "--samples", str(args.samples)], check=True, stdout=subprocess.DEVNULL)
    facts |= figures(folder / "report" / "report.json")
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def table(output: Path) -> Iterator[str]:
    """Yield the lines of a Markdown table of the finished rows."""
    heads = ["Uses", "Trajectories", "Updates", "Passes", *HEAD[1:5], "CPU seconds", "Wall seconds"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in (*map(str, USES), "first"):
        if not (path := output / row / FACTS).is_file():
            continue
        facts = json.loads(path.read_text())
        name = f"{FIRST_USES}, all recorded first" if row == "first" else row
        cells = [name, str(facts["trajectories"]), str(facts["updates"]), f"{facts['passes']:,.0f}"]
        cells += [f"{facts[head]:.2f}" for head in HEAD[1 : 1 + len(STEPS)]]
        cells += [f"{facts[name]:.0f}" for name in ("cpu_seconds", "seconds")]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="glyphs", help="the recipe of the teacher (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--passes", type=float, default=60_000, help="passes of each run (default: %(default)s)")
    parser.add_argument("--updates", type=int, help="updates of each run, in place of --passes")
    parser.add_argument("--bank", type=int, default=512, help="trajectories held at once (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="pictures of each evaluation (default: %(default)s)")
    parser.add_argument("--reuse", nargs="+", help="rows: uses, or the word first (default: all)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other fields of the recipe")
    args = parser.parse_args()
    for row in args.reuse or (*map(str, USES), "first"):
        run(args.teacher, row, args)
    sys.stdout.write("\n".join(table(args.output)) + "\n")


if __name__ == "__main__":
    main()
