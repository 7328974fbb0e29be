"""Make the student's pictures at every stochasticity, and hold them beside the teacher's, as features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....flash_core.measures.distances import frechet_distance
from ..generate import decode_pictures, sweep_latents, sweep_passes
from ..task.runs import INDEPENDENT
from ..task_comparison import TaskComparison
from ..teacher_comparison import TeacherComparison

if TYPE_CHECKING:
    from rich.progress import Progress

Setting = tuple[int, float]  # step count, stochasticity


@dataclass(frozen=True)
class SweptSets:
    """Sets of pictures in feature space.

    Attributes:
        students: {(step count, stochasticity): (N, D)}; row i has the same prompt, conditions and noise in every set.
        reference: the teacher's independent set, (N times, D).
        floor: the distance of another set of the teacher's to ``reference``; None where there is no such set.
    """

    students: dict[Setting, Tensor]
    reference: Tensor
    floor: float | None


def sweep_text_to_image(comparison: TeacherComparison, sweep: Sequence[Setting], progress: Progress) -> SweptSets:
    """Sweep a text-to-image student against the teacher's reference, which is made where none is stored."""
    comparison.progress = progress
    comparison.student_runs = []  # the sweep makes the student's pictures
    comparison.prepare()
    reference, samples = comparison.reference, comparison.samples
    size = comparison.options.batch_size
    bar = progress.add_task("student", total=sweep_passes(sweep) * len(samples), unit="passes")
    found: dict[Setting, list[Tensor]] = {setting: [] for setting in sweep}
    for begin in range(0, len(samples), size):
        batch = samples.rows(range(begin, min(begin + size, len(samples))))
        swept = sweep_latents(comparison.maker, sweep, batch.prompts, batch.seeds, partial(progress.advance, bar))
        for setting, latents in zip(sweep, swept, strict=True):
            pictures = decode_pictures(comparison.maker, latents).to(comparison.maker.device)
            with torch.inference_mode():
                found[setting].append(comparison.network(pictures)[0].float().cpu())
    return SweptSets(
        {setting: torch.cat(parts) for setting, parts in found.items()},
        reference.first.features,
        frechet_distance(reference.second.features, reference.first.features),
    )


def sweep_task(comparison: TaskComparison, sweep: Sequence[Setting], progress: Progress) -> SweptSets:
    """Sweep the student of a conditional task against results of the teacher with the same conditions, other noise.

    The teacher's results come from ``comparison.reference`` where that file is there.
    """
    samples, many, stored = comparison.options.samples, comparison.many, comparison.stored()
    passes = sweep_passes(sweep) + (0 if stored else many.nfe)
    bar = progress.add_task(comparison.task.name, total=passes * samples, unit="passes")
    found: dict[Setting, list[Tensor]] = {setting: [] for setting in sweep}
    independent = []
    with torch.inference_mode():
        for batch in comparison.batches():
            rows, scene = comparison.encode(batch)
            if not stored:
                independent.append(comparison.look(comparison.independent_results(rows, scene, batch)[0]))
                progress.advance(bar, many.nfe * len(batch))
            swept = sweep_latents(rows, sweep, rows.prompts, batch.seeds, partial(progress.advance, bar))
            for setting, drawn in zip(sweep, swept, strict=True):
                found[setting].append(comparison.look(comparison.task.finished(decode_pictures(rows, drawn), scene)))
    students = {setting: torch.cat(parts) for setting, parts in found.items()}
    if not stored:
        return SweptSets(students, torch.cat(independent), None)
    reference = stored[INDEPENDENT].features()["features"]
    return SweptSets(students, reference, frechet_distance(stored[many.name].features()["features"], reference))
