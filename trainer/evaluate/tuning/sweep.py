"""Make the student's pictures at every stochasticity, and hold them beside the teacher's, as features."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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

    from ..task.samples.sample_set import SampleSet

Setting = tuple[int, float]  # step count, stochasticity


@dataclass(frozen=True)
class SweptSet:
    """One set of samples in feature space.

    Attributes:
        students: {(step count, stochasticity): (N, D)}; row i has the same prompt, conditions and noise everywhere.
        reference: the teacher's independent pictures, (N times, D).
        floor: the distance of other pictures of the teacher's to ``reference``; None where there are none.
    """

    students: dict[Setting, Tensor]
    reference: Tensor
    floor: float | None


def sweep_text_to_image(comparison: TeacherComparison, sweep: Sequence[Setting], progress: Progress) -> list[SweptSet]:
    """Sweep a text-to-image student against the teacher's reference, which is made where none is stored.

    Each of ``comparison.draws`` gives a set; all have the one reference.
    """
    comparison.progress = progress
    comparison.student_runs = []  # the sweep makes the student's pictures
    comparison.prepare()
    first, second = comparison.reference.first.features, comparison.reference.second.features
    floor, size, draws = frechet_distance(second, first), comparison.options.batch_size, comparison.draws
    bar = progress.add_task("student", total=sweep_passes(sweep) * sum(map(len, draws)), unit="passes")
    sets = []
    for samples in draws:
        found: dict[Setting, list[Tensor]] = {setting: [] for setting in sweep}
        for begin in range(0, len(samples), size):
            batch = samples.rows(range(begin, min(begin + size, len(samples))))
            swept = sweep_latents(comparison.maker, sweep, batch.prompts, batch.seeds, partial(progress.advance, bar))
            for setting, latents in zip(sweep, swept, strict=True):
                pictures = decode_pictures(comparison.maker, latents).to(comparison.maker.device)
                with torch.inference_mode():
                    found[setting].append(comparison.network(pictures)[0].float().cpu())
        sets.append(SweptSet({setting: torch.cat(parts) for setting, parts in found.items()}, first, floor))
    return sets


def sweep_task(comparison: TaskComparison, sweep: Sequence[Setting], progress: Progress) -> list[SweptSet]:
    """Sweep the student of a conditional task against results of the teacher with the same conditions, other noise.

    With a reference file all of the teacher's answers are made where the file is missing, and stored. Without one only
    the results that the student is measured against are made, and there is no floor.
    """
    samples, many, maker = comparison.options.samples, comparison.many, comparison.maker
    stored = [comparison.stored(sample_set) for sample_set in comparison.sample_sets]
    bar = progress.add_task(comparison.task.name, total=0, unit="passes")

    def makes_all(sample_set: SampleSet, answers: Collection[str]) -> bool:
        return sample_set.reference is not None and not answers

    def passes(sample_set: SampleSet, answers: Collection[str]) -> int:
        if makes_all(sample_set, answers):
            found = comparison.passes(answers, of_student=False)
            return found if comparison.measures_sets else found + many.nfe
        return 0 if INDEPENDENT in answers else many.nfe

    pairs = list(zip(comparison.sample_sets, stored, strict=True))
    progress.update(bar, total=samples * sum(sweep_passes(sweep) + passes(*pair) for pair in pairs))
    sets = []
    for sample_set, answers in pairs:
        with torch.inference_mode():
            if makes_all(sample_set, answers):
                comparison.answer_all(sample_set, answers, progress, bar, of_student=False)
                answers = comparison.of_teacher(sample_set)
            found: dict[Setting, list[Tensor]] = {setting: [] for setting in sweep}
            independent = []
            for batch in maker.batches(sample_set):
                rows, scene = maker.encode(batch)
                if INDEPENDENT not in answers:
                    independent.append(maker.look(maker.independent_results(rows, scene, batch)[0]))
                    progress.advance(bar, many.nfe * len(batch))
                swept = sweep_latents(rows, sweep, rows.prompts, batch.seeds, partial(progress.advance, bar))
                for setting, drawn in zip(sweep, swept, strict=True):
                    finished = comparison.task.finished(decode_pictures(rows, drawn), scene)
                    found[setting].append(maker.look(finished))
        students = {setting: torch.cat(parts) for setting, parts in found.items()}
        if independent:
            sets.append(SweptSet(students, torch.cat(independent), None))
        else:
            reference = answers[INDEPENDENT].features()["features"]
            floor = frechet_distance(answers[many.name].features()["features"], reference)
            sets.append(SweptSet(students, reference, floor))
        sample_set.forget_features()
    return sets
