"""Measure the student's distance to its teacher at several values of stochasticity, choose, and write the choice.

The values are compared on the same prompts and noise, at 2, 4 and 8 steps; one step adds no noise. docs/evaluation.md
tells how to read the table.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from ...errors import UserError
from ...files import writing
from ...recipes import load_run_recipe
from ..progress import progress_bar
from ..request import EvaluationRequest, TaskComparisonRequest, TeacherComparisonRequest
from .stored import FILE, Tuned

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ....flash_core.lora import FlashMetadata
    from .choice import Choice

logger = logging.getLogger(__name__)

STEP_COUNTS = (2, 4, 8)
VALUES = (0.0, 0.3, 0.5, 0.7, 1.0)
OUTPUT_FILE = "tuning.json"


@dataclass(frozen=True)
class TuningRequest:
    """What to measure and where to write it.

    Attributes:
        comparison: the student, its teacher, the prompts or the task's pictures, the features.
        lora: the student's file or folder.
        metadata: of the file; None for a file without.
        values: of stochasticity, ascending.
        preferred: {step count: stochasticity of the recipe, or of the file}, which wins among values close to the best.
        run: the folder of the run, which gets ``sampler.json``; None without a run.
        write: write into ``lora`` and ``run``; else only show.
    """

    comparison: TeacherComparisonRequest | TaskComparisonRequest
    lora: Path
    metadata: FlashMetadata | None
    values: tuple[float, ...]
    preferred: Mapping[int, float]
    run: Path | None
    write: bool


def tuning_request(args: argparse.Namespace, comparison: EvaluationRequest) -> TuningRequest:
    """Make the request that the options of ``evaluate --tune-sampler`` ask for.

    Raises:
        UserError: an option has no meaning here, or the LoRA's file can't take the result.
    """
    from ....flash_core.lora import LoraError, nearest_stochasticity, read_lora

    if not isinstance(comparison, (TeacherComparisonRequest, TaskComparisonRequest)):
        raise UserError("--tune-sampler measures against the teacher, not by a --protocol; give only one of the two")
    if isinstance(comparison, TeacherComparisonRequest) and comparison.make_reference:
        raise UserError("--tune-sampler makes the reference that it needs; leave --make-reference out")
    if args.stochasticity is not None:
        raise UserError("--tune-sampler measures several values; leave --stochasticity out")
    lora = comparison.model.lora
    if lora is None:
        raise UserError("--tune-sampler needs a student; give its LoRA with --lora, or its run with --run")
    values = tuple(sorted(set(args.tune_sampler or VALUES)))
    if len(values) < 2 or not all(0 <= value <= 1 for value in values):
        told = " ".join(f"{value:g}" for value in args.tune_sampler)
        raise UserError(f"--tune-sampler: expected at least two different numbers from 0 to 1, got {told}")
    try:
        file = read_lora(lora)
    except LoraError as error:
        raise UserError(str(error)) from error
    metadata = file.metadata
    if args.write and (metadata is None or file.published or not lora.is_file()):
        raise UserError(
            f"--write: {lora} has no Flash metadata that could hold the result; expected a .safetensors file of "
            "`flash-diffusion distill` or `flash-diffusion export`. Leave --write out to see the table alone"
        )
    if args.run is not None:
        preferred = dict.fromkeys(STEP_COUNTS, load_run_recipe(args.run).sampler.stochasticity)
    else:
        known = metadata.stochasticity if metadata is not None else {}
        preferred = {steps: nearest_stochasticity(known, steps)[0] for steps in STEP_COUNTS}
    return TuningRequest(comparison, lora, metadata, values, preferred, args.run, args.write)


def tune_sampler(request: TuningRequest, console: Console) -> Tuned:
    """Measure, choose, print the table and write what the request asks for; return the result.

    Args:
        console: for the progress and the notes; the table goes to the standard output.
    """
    from rich.console import Console

    from ..task_comparison import comparison_of as task_comparison_of
    from ..teacher_comparison import comparison_of
    from .choice import choose
    from .sweep import sweep_task, sweep_text_to_image

    sweep = [(steps, value) for steps in STEP_COUNTS for value in request.values]
    comparison = request.comparison
    if isinstance(comparison, TaskComparisonRequest):
        of_task = task_comparison_of(comparison)
        with progress_bar(console) as progress:
            sets = sweep_task(of_task, sweep, progress)
        network, enough, task = of_task.network.title, of_task.enough, comparison.task.name
    else:
        of_teacher = comparison_of(comparison)
        with progress_bar(console) as progress:
            sets = sweep_text_to_image(of_teacher, sweep, progress)
        network, enough, task = of_teacher.network.title, of_teacher.enough, Tuned.task
    choices = [
        choose(
            steps,
            [{value: each.students[steps, value] for value in request.values} for each in sets],
            [each.reference for each in sets],
            request.preferred[steps],
        )
        for steps in STEP_COUNTS
    ]
    samples, floors = comparison.options.samples, [each.floor for each in sets if each.floor is not None]
    tuned = Tuned(
        {choice.steps: choice.taken for choice in choices},
        {choice.steps: choice.distances for choice in choices},
        fmean(floors) if len(floors) == len(sets) else None,
        network,
        samples,
        request.metadata.training.get("updates", "") if request.metadata is not None else "",
        task,
        len(sets),
    )
    out = Console()
    unit = "distance to the teacher" if tuned.floor is None else "distance to the teacher / floor"
    several = "" if len(sets) == 1 else f", means over {len(sets)} sets"
    out.print(
        f"Fréchet {unit}{several}, by steps and stochasticity (* taken, = within one standard error of the smallest):",
        soft_wrap=True,
    )
    out.print(table_of(choices, tuned.floor))
    for choice in choices:
        out.print(in_words(choice, tuned.floor), soft_wrap=True, highlight=False)
    if samples < enough:
        out.print(
            f"NOTE: {samples} pictures are too few for these features; the choice is usable from --samples {enough} "
            "on.",
            soft_wrap=True,
            highlight=False,
        )
    tuned.write(comparison.output / OUTPUT_FILE)
    for line in _write(tuned, request):
        out.print(line, soft_wrap=True, highlight=False)
    return tuned


def table_of(choices: Sequence[Choice], floor: float | None) -> Table:
    """Return the distances, a row for each step count; ``*`` is taken, ``=`` within one standard error of the best."""
    from rich.table import Table

    table = Table()
    table.add_column("steps", justify="right")
    for value in choices[0].distances:
        table.add_column(f"{value:g}", justify="right")
    for choice in choices:
        cells = []
        for value, distance in choice.distances.items():
            mark = "*" if value == choice.taken else "=" if value in choice.close else " "
            cells.append(f"{distance / (floor or 1):.3g}{mark}")
        table.add_row(str(choice.steps), *cells)
    return table


def in_words(choice: Choice, floor: float | None) -> str:
    """Return a line on the choice: what is taken and why, what is close to it, what is worse beyond chance."""

    def told(value: float) -> str:
        return f"{value:g} ({choice.distances[value] / (floor or 1):.3g}{'' if floor is None else ' x the floor'})"

    line = f"{choice.steps} steps: {told(choice.taken)}"
    if choice.taken != choice.best:
        line += (
            f", which is nearest to the recipe's value and within one standard error of the best, {told(choice.best)}"
        )
    others = [value for value in choice.close if value not in (choice.taken, choice.best)]
    line += f". Also within one standard error: {_listed(others)}." if others else "."
    return line + (f" Farther from the teacher, beyond chance: {_listed(choice.worse)}." if choice.worse else "")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _write(tuned: Tuned, request: TuningRequest) -> list[str]:
    """Write the choice where the request asks for it; return what was done, a line each."""
    from ....flash_core.lora import change_header, stochasticity_string
    from ....flash_core.lora.metadata import STOCHASTICITY_KEY

    if not request.write:
        where = "the LoRA's metadata" + (" and the run's folder" if request.run is not None else "")
        return [f"Nothing was changed. Add --write to write these values into {where}."]
    with writing(request.lora):
        change_header(request.lora, {STOCHASTICITY_KEY: stochasticity_string(tuned.stochasticity)})
    lines = [f"Written into the metadata of {request.lora}: Flash Sampler's 'auto' takes these values."]
    if request.run is not None:
        tuned.write(request.run / FILE)
        lines.append(
            f"Written into {request.run / FILE}: every export of this run takes them. "
            f"`flash-diffusion export {request.run}` writes the model card anew."
        )
    return lines
