"""Where the time of an update goes: by the moment of the update and by the kind of operator, from torch's profiler.

    python -m benchmarks.profile_update --output out/profile
    python -m benchmarks.profile_update --recipe glyphs --set batch_size=16 --output out/profile-glyphs

A run of the demo with fresh trajectories and every term makes some updates, of which the last are profiled on the CPU.
Shares are of the time inside the updates, each operator's own, without what it calls. The profiler itself takes time at
every operator: compare the two times of an update that are printed.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch.profiler import ProfilerActivity, profile, record_function

from flash_diffusion.flash_core.distiller import Distiller
from flash_diffusion.trainer.distill.loop import Run
from flash_diffusion.trainer.recipes import load_recipe

EVERY_TERM = (
    *("trajectories.count=0", "batch_size=4", "method.fake_score=critic"),
    *("phases.0.adversarial=0.3", "phases.0.dmd=0.7"),
)
MOMENT = "moment: "
REST = f"{MOMENT}optimisers, average, rest"
MOMENTS = {  # method of the distiller -> what it is called here
    "rollout": "the teacher solves",
    "student_step": "student's step",
    "discriminator_step": "heads' step",
    "critic_step": "critic's step",
}
BETWEEN = "between operators (Python, autograd)"
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (  # the first whose part is in the name
    ("attention", ("_attention",)),
    ("convolutions", ("convolution", "conv2d", "thnn_conv")),
    ("matrix products", ("::mm", "addmm", "bmm", "::linear", "matmul", "::mv", "einsum")),
    ("norms", ("group_norm", "layer_norm", "rms_norm", "GroupNorm", "LayerNorm")),
    ("optimisers", ("_fused_adamw", "_foreach", "lerp", "Optimizer.")),
    (
        "copies and new memory",
        ("copy_", "::cat", "::clone", "contiguous", "::empty", "::zero", "::fill", "::to", "::pad"),
    ),
)
ELEMENT_WISE = "element by element, sums and views"


def kind_of(name: str) -> str:
    """Return the kind of an event of the profiler."""
    if "::" not in name or name.startswith(("autograd::", MOMENT)):
        return next((kind for kind, parts in KINDS if kind == "optimisers" and any(p in name for p in parts)), BETWEEN)
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), ELEMENT_WISE)


@contextmanager
def marked() -> Iterator[None]:
    """Mark the distiller's steps for the profiler inside the block."""
    before = {name: getattr(Distiller, name) for name in MOMENTS}

    def mark(method: Callable[..., Any], title: str) -> Callable[..., Any]:
        @wraps(method)
        def named(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"{MOMENT}{title}"):
                return method(*args, **kwargs)

        return named

    for name, method in before.items():
        setattr(Distiller, name, mark(method, MOMENTS[name]))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(Distiller, name, method)


def shares(events: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Return moment -> kind of operator -> share of the time of all updates."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        around = event
        while around is not None and not around.name.startswith(MOMENT):
            around = around.cpu_parent
        if around is not None:
            found[around.name.removeprefix(MOMENT)][kind_of(event.name)] += event.self_cpu_time_total
    whole = sum(sum(kinds.values()) for kinds in found.values())
    return {moment: {kind: spent / whole for kind, spent in kinds.items()} for moment, kinds in found.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """Return the shares as Markdown, in percent: moments in columns, kinds in rows, the largest first."""
    moments = sorted(found, key=lambda moment: -sum(found[moment].values()))
    kinds = sorted({kind for one in found.values() for kind in one}, key=lambda kind: -_sum(found, kind))
    lines = [f"| | {' | '.join(moments)} | together |", "|---" * (len(moments) + 2) + "|"]
    for kind in kinds:
        cells = [f"{found[moment].get(kind, 0):.1%}" for moment in moments]
        lines.append(f"| {kind} | {' | '.join(cells)} | {_sum(found, kind):.1%} |")
    sums = [f"{sum(found[moment].values()):.1%}" for moment in moments]
    return "\n".join(
        [*lines, f"| **together** | {' | '.join(sums)} | {sum(_sum(found, kind) for kind in kinds):.1%} |"]
    )


def _sum(found: dict[str, dict[str, float]], kind: str) -> float:
    return sum(one.get(kind, 0.0) for one in found.values())


def main() -> None:
    """Train some updates, profile the last, and print where their time went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--updates", type=int, default=3, help="profiled (default: 3)")
    parser.add_argument("--output", type=Path, required=True, help="an empty folder for the run")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # as `flash-diffusion distill` does
    cache = f"data.cache={arguments.output / 'cache'}"
    recipe = load_recipe(arguments.recipe, [*EVERY_TERM, cache, *arguments.overrides])
    run = Run(recipe, arguments.output, Accelerator(cpu=True), None)

    def update() -> None:
        with record_function(REST):
            run.updater.update(run.state, recipe.phases[0], 1.0)

    update()  # the first makes the optimisers' state
    started = time.process_time()
    for _ in range(arguments.updates):
        update()
    plain = time.process_time() - started
    with marked(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.process_time()
        for _ in range(arguments.updates):
            update()
        profiled = time.process_time() - started
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(shares(profiler.events())), markup=False)
    each = plain / arguments.updates, profiled / arguments.updates
    console.print(f"\nSeconds of the processor an update: {each[0]:.2f}, profiled {each[1]:.2f}")


if __name__ == "__main__":
    main()
