"""What every shipped recipe needs, rehearsed: peak memory, work and its floor, the cards that it fits on, and hours.

    python -m benchmarks.rehearsal --output benchmarks/results/rehearsal.md        (all recipes: CPU minutes each)
    python -m benchmarks.rehearsal sd15 sdxl --set batch_size=1

Nothing is downloaded and no GPU is needed: see ``trainer/rehearse``. Hours are an estimate, at the stated utilisation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.recipes import load_recipe, shipped_recipes
from flash_diffusion.trainer.rehearse.cost import cost_of, fits, peaks
from flash_diffusion.trainer.rehearse.gpus import GIB, GPUS, TERA, UTILISATION
from flash_diffusion.trainer.rehearse.report import shares_above_floor, work_of
from flash_diffusion.trainer.rehearse.walk import rehearse

MEMORIES = (8, 12, 16, 24)
CARDS = ("4090", "h100")
HEADING = (
    "| recipe | batch | checkpointing | static GiB | update, GiB | preview, GiB | encoding, GiB | "
    f"fits {' / '.join(map(str, MEMORIES))} GB | TFLOP an update | x floor | most above the floor | bytes, x floor | "
    f"updates | hours on {' / '.join(CARDS)} |\n" + "|---" * 14 + "|"
)


def rows(names: Sequence[str], overrides: Sequence[str], console: Console) -> Iterator[str]:
    """Yield a line of the table for each recipe."""
    for name in names:
        recipe = load_recipe(name, overrides)
        started = time.process_time()
        try:
            rehearsal = rehearse(recipe)
        except UserError as error:
            console.print(f"{name}: {error}", style="red", markup=False)
            continue
        training, encoding = peaks(rehearsal)
        preview = rehearsal.beside["preview"].peak
        update = max(moment.peak for phase in rehearsal.phases for moment in phase.moments.values())
        flops, moved, floor = work_of(rehearsal)
        most, share = max(shares_above_floor(rehearsal).items(), key=lambda item: item[1])
        verdicts = ["yes" if fits(max(training, encoding), gib) else
                    "training" if fits(training, gib) else "no" for gib in MEMORIES]  # fmt: skip
        hours = [cost_of(rehearsal, GPUS[card], UTILISATION).hours for card in CARDS]
        title = " ".join([name, *(f"`{one}`" for one in overrides)])
        yield (
            f"| {title} | {recipe.batch_size} x {recipe.gradient_accumulation} | "
            f"{'on' if recipe.gradient_checkpointing else 'off'} | {sum(rehearsal.parts.values()) / GIB:.2f} | "
            f"{update / GIB:.2f} | {preview / GIB:.2f} | {encoding / GIB:.2f} | {' / '.join(verdicts)} | "
            f"{_figure(flops / recipe.updates / TERA)} | {flops / floor.flops:.2f} | {most} {share:+.0%} | "
            f"{moved / floor.moved:.1f} | {recipe.updates:,} | {' / '.join(map(_figure, hours))} |"
        )
        console.print(f"{name}: {time.process_time() - started:.0f} s of the CPU", highlight=False)


def _figure(value: float) -> str:
    """Return a number with three digits, from 1000 on with all of them."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main() -> None:
    """Rehearse and print; a file gets each line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names of recipes (default: all that are shipped)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, help="write the table into this Markdown file as well")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    lines = [HEADING]
    for row in rows(arguments.recipes or shipped_recipes(), arguments.overrides, console):
        lines.append(row)
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
