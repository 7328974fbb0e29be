"""Print a rehearsal in plain words: memory, work, time, and what would make the run fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ..config import Recipe
from .cost import Way, cost_of, fits, peaks, ways_to_fit
from .floor import Floor, above_floor
from .gpus import BUS, GIB, RESERVED, Gpu
from .meter import ACTIVATIONS
from .walk import Rehearsal, rehearse

PETA, TERA, GIGABYTE = 1e15, 1e12, 1e9
LEAST_SHARE = 0.0005  # that is told
HEADINGS = {  # of the moments, in their order; short, since a terminal of 80 columns shows them all
    "encoding": "encode",
    "recording": "record",
    "rollout": "rollout",
    "student": "student",
    "discriminator": "heads",
    "critic": "critic",
    "optimiser": "step",
    "preview": "preview",
}


def print_rehearsal(
    recipe: Recipe, gpu: Gpu, console: Console, *, utilisation: float, price: float | None = None
) -> None:
    """Rehearse a recipe and print what it needs on a card.

    Args:
        utilisation: share of the card's peak that training is assumed to reach.
        price: of an hour of the card, in dollars; None for no cost.

    Raises:
        UserError: the recipe does not fit the model.
    """

    def say(text: str = "") -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say("Rehearsing on tensors without values: no weights are read, nothing is trained. This takes some minutes.")
    rehearsal = rehearse(recipe)
    say()
    say(
        f"{rehearsal.model} ({recipe.model.family}), batch {recipe.batch_size} x {recipe.gradient_accumulation}"
        f"{', gradient checkpointing' if recipe.gradient_checkpointing else ''}, "
        f"base in {recipe.model.storage or recipe.model.dtype}"
    )
    if rehearsal.published:
        say(f"  {recipe.model.path} can't be read here: the published sizes of its family stand in for it")
    say("encode: before training; rollout: the teacher solves; heads: of the discriminator; step: of the optimisers")
    say()
    console.print(memory_table(rehearsal))
    if rehearsal.waiting:
        crossed = [phase.crossed / GIGABYTE for phase in rehearsal.phases]
        say(
            f"In the computer's memory: {_gib(rehearsal.waiting)} GiB of the base. An update copies {_span(crossed)} GB"
        )
        seconds = _span([each / BUS for each in crossed])
        say(f"  to the device: {seconds} s at {BUS:g} GB/s, an assumption, in part while the device computes")
        say()
    if recipe.sharding == "base":
        whole = rehearsal.parts["base"]
        say(f"sharding: base is not in the table: of the base's {_gib(whole)} GiB each of N devices keeps 1 / N,")
        say("  and the weights of the block that it computes")
        say()
    console.print(work_table(rehearsal))
    say(rest_in_words(rehearsal))
    cost = cost_of(rehearsal, gpu, utilisation)
    say(f"The whole run: {cost.flops / PETA:,.3g} PFLOP")
    money = "" if price is None else f", {cost.hours * price:,.2f} dollars at {price:g} an hour"
    limit = f"{utilisation:.0%} of its {gpu.flops(recipe.precision) / TERA:g} TFLOP/s, an assumption"
    if cost.bound == "memory":
        limit = f"its {gpu.bandwidth:g} GB/s, which decide here"
    elif cost.bound == "bus":
        limit = f"copies at {BUS:g} GB/s, an assumption, which decide here"
    say(f"On one {gpu.name}: about {_hours(cost.hours)}{money} ({limit})")
    for place, count in rehearsal.waits.items():
        say(f"An update waits for the GPU {count} times at {place}")
    say()
    _say_fit(rehearsal, gpu, say)
    say()
    say(
        "Rehearsed on fake tensors, not measured; without cuDNN's workspaces and fragmentation, for which "
        f"{RESERVED:g} GiB are kept free."
    )


def memory_table(rehearsal: Rehearsal) -> Table:
    """Return the peak of every moment in a column, with its parts in rows."""
    moments = rehearsal.moments
    columns = [moments[name] for name in HEADINGS if name in moments]
    parts = dict.fromkeys(name for moment in columns for name, size in moment.parts.items() if size)
    table = Table(
        title="Memory in GiB, at the peak of each moment",
        box=box.SIMPLE,
        title_justify="left",
        padding=(0, 0, 0, 1),
        show_edge=False,
    )
    table.add_column("")
    for name, heading in HEADINGS.items():
        if name in moments:
            table.add_column(heading, justify="right", no_wrap=True)
    for part in [*(name for name in parts if name != ACTIVATIONS), ACTIVATIONS]:
        table.add_row(part, *(_gib(moment.parts.get(part, 0)) for moment in columns))
    table.add_row("together", *(_gib(moment.peak) for moment in columns), style="bold")
    return table


def work_table(rehearsal: Rehearsal) -> Table:
    """Return the work of an update of each phase."""
    table = Table(
        title="Work of an update, expected over the starts of its samples; bytes at least",
        box=box.SIMPLE,
        title_justify="left",
    )
    for heading in ("phase", "updates", "passes", "TFLOP", "x floor", "GB moved", "x floor"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for phase in rehearsal.phases:
        table.add_row(
            phase.name,
            f"{phase.updates:,}",
            f"{phase.passes:.0f}",
            f"{phase.flops / TERA:,.3g}",
            f"{phase.flops / phase.floor.flops:.2f}",
            f"{phase.moved / GIGABYTE:,.3g}",
            f"{phase.moved / phase.floor.moved:.1f}",
        )
    return table


def work_of(rehearsal: Rehearsal) -> tuple[float, float, Floor]:
    """Return the FLOPs and the bytes of all updates, and their floor."""
    flops = moved = least_flops = least_moved = 0.0
    for phase in rehearsal.phases:
        flops += phase.updates * phase.flops
        moved += phase.updates * phase.moved
        least_flops += phase.updates * phase.floor.flops
        least_moved += phase.updates * phase.floor.moved
    return flops, moved, Floor(least_flops, least_moved)


def shares_above_floor(rehearsal: Rehearsal) -> dict[str, float]:
    """Return what the FLOPs of all updates above their floor are spent on, in shares of the floor."""
    work: dict[str, float] = {}
    for phase in rehearsal.phases:
        for kind, flops in phase.work.items():
            work[kind] = work.get(kind, 0.0) + phase.updates * flops
    return above_floor(work, work_of(rehearsal)[2].flops)


def rest_in_words(rehearsal: Rehearsal) -> str:
    """Return what the work above the floor is spent on, over all updates."""
    spent = sorted(shares_above_floor(rehearsal).items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {share:+.1%}" for name, share in spent if abs(share) >= LEAST_SHARE)
    return f"Above the floor, in shares of the floor: {told or 'nothing'}"


def _say_fit(rehearsal: Rehearsal, gpu: Gpu, say: Callable[[str], None]) -> None:
    training, encoding = peaks(rehearsal)
    most = max(training, encoding)
    if fits(most, gpu.memory):
        say(f"Fits in {gpu.memory:g} GB: yes ({_gib(most)} GiB at the peak)")
        return
    why = f"training {_gib(training)} GiB, encoding {_gib(encoding)} GiB"
    say(f"Fits in {gpu.memory:g} GB: no ({why}). What would make it fit:")
    fitted = False
    for way in ways_to_fit(rehearsal, gpu.memory):
        say(f"  {_way(way, gpu)}")
        fitted = fitted or way.fits(gpu.memory)
    if not fitted:
        say("  nothing of this: a lower data.resolution or lora.rank, or a larger card")


def _way(way: Way, gpu: Gpu) -> str:
    verdict = "fits" if way.fits(gpu.memory) else "does not fit"
    return f"{way.words}: training {_gib(way.training)}, encoding {_gib(way.encoding)} GiB: {verdict}"


def _span(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return f"{most:,.3g}" if f"{least:.3g}" == f"{most:.3g}" else f"{least:,.3g} to {most:,.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _hours(hours: float) -> str:
    return f"{hours:.3g} hours" if hours < 48 else f"{hours:,.0f} hours ({hours / 24:.1f} days)"
