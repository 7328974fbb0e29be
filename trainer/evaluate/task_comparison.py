"""Compare a student with its teacher on a conditional task: inpainting, super-resolution, face-swap, control.

Each sample has its own conditions, caption and noise, which all runs share: the teacher in many steps, the student in
few steps, the undistilled teacher in few steps. There can be several sets of samples, each from its own seed; figures
are then means over the sets. The task defines the figures (``tasks/figures.py``). This file decides the runs and the
targets; ``task/`` makes the pictures and measures sets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import __version__
from ...flash_core.measures.random_features import RandomFeatures
from ..files import file_hash
from ..metrics.embedders import load_features, samples_needed
from ..metrics.pictures.teacher_states import TeacherStates
from ..tasks.base import Task
from ..tasks.figures import Figure
from ..teachers.hashes import weights_hash
from .curve import curves_of
from .evaluator import Evaluator, Record, SeesPictures, environment
from .generate import SamplingSetting, default_solver, interval_note, sampler_facts, sampler_note
from .request import FEW_STEPS, GUIDED_STEPS, Options, TaskComparisonRequest
from .task.about import AboutTask, about_task
from .task.figures import KIND_OF
from .task.measured import Measured, MeasuredSet
from .task.runs import INDEPENDENT, Entry, entries_of
from .task.samples.answers import Answers, Shown
from .task.samples.making import AnswerMaker
from .task.samples.sample_set import SampleSet, sample_sets
from .task.samples.stored import find_answers, save_answers
from .task.samples.subjects import Subjects, read_sets
from .task.targets import targets_of, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from ..teachers.base import Teacher

logger = logging.getLogger(__name__)

FEWEST_SAMPLES = 32  # for targets: of fewer samples the bootstrap's intervals are too narrow


def compare_on_task(request: TaskComparisonRequest, console: Console) -> bool:
    """Do what the request asks for. Return True: there is a report."""
    comparison_of(request).evaluate(console)
    return True


def comparison_of(request: TaskComparisonRequest) -> TaskComparison:
    """Load what a request names.

    Raises:
        UserError: an input can't be read, or does not fit.
    """
    from ..metrics.lpips import lpips_of_unit_pictures

    options, device = request.options, request.model.pick_device()
    features = load_features(request.features)
    subjects = read_sets(request.data, request.task, options)
    model = request.model.load(device, request.task)
    return TaskComparison(
        model.teacher,
        request.task,
        subjects,
        features.network.to(model.teacher.device),
        options,
        output=request.output,
        student=model.student,
        perceptual=None if request.vgg is None else lpips_of_unit_pictures(model.teacher.device, request.vgg),
        origin={
            "teacher": model.weights,
            "features": features.fingerprint,
            "vgg": None if request.vgg is None else file_hash(request.vgg),
            "lora": str(request.model.lora) if request.model.lora else None,
            "model": list(request.model.fields),
        },
        about=about_task(features, request.model.is_demo, subjects[0]),
        reference=request.reference,
    )


class TaskComparison(Evaluator[Entry]):
    """All runs on the same samples, batch after batch: memory does not grow with the number of samples' pixels.

    Args:
        subjects: for each set of samples the pictures that they are drawn from. The sets have the seeds
            ``options.seed``, ``options.seed + 1``, ...
        student: the student's title in the report; None evaluates the teacher alone.
        perceptual: LPIPS of pictures (B, 3, H, W) in [0, 1]; None leaves LPIPS out.
        origin: further entries of the report's origin.
        about: what follows from the inputs.
        reference: file of the teacher's answers: read where it is there, else made. Further sets have files beside it,
            see :func:`~.task.samples.sample_set.sample_sets`. None keeps nothing.
    """

    kind = "task"

    def __init__(
        self,
        teacher: Teacher,
        task: Task,
        subjects: Sequence[Subjects],
        network: SeesPictures,
        options: Options,
        *,
        output: Path,
        student: str | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        origin: Mapping[str, Any] | None = None,
        about: AboutTask | None = None,
        reference: Path | None = None,
    ) -> None:
        super().__init__(output, student)
        self.teacher = teacher
        self.task = task
        self.options = options
        self.network = network
        self.origin = dict(origin or {})
        self.about = about or AboutTask()
        self.sample_sets = sample_sets(subjects, options.seed, reference, options.pictures)
        self.entries = entries_of(task, options, student is not None)
        self.many = SamplingSetting("teacher", options.steps, options.guidance, options.interval)
        blank = torch.ones(1, 3, *teacher.resolution)
        self.dimensions = network(blank.to(teacher.device))[0].shape[1]
        self.enough = samples_needed(self.dimensions)
        self.measures_sets = options.samples >= self.enough
        self.maker = AnswerMaker(teacher, task, network, options, self.many, perceptual, self.measures_sets)
        for note in self._too_few_samples():
            logger.warning("%s", note)
        self.shown = Shown()

    def runs(self) -> list[Entry]:
        """Return the entries of :func:`entries_of`."""
        return self.entries

    def prepare(self) -> None:
        """Make and score the pictures of all runs, those of the teacher only where they are not stored."""
        made = [self.stored(sample_set) for sample_set in self.sample_sets]
        names = [entry.name for entry in self.entries]
        bar = self.progress.add_task(self.task.name, total=0, unit="passes")
        for found in made:
            self.expect(bar, self.passes(found) * self.options.samples)
        sets = []
        with torch.inference_mode():
            for sample_set, found in zip(self.sample_sets, made, strict=True):
                self.answer_all(sample_set, found, self.progress, bar)
                sets.append(MeasuredSet.of(sample_set, names, self.many.name, self.measures_sets))
                sample_set.forget_features()
        self.measured = Measured(sets, self.task.figures)
        self.estimates = {name: self.measured.estimates(name) for name in names}
        self.comparisons = self._comparisons() if self.student is not None else []

    def measure(self, entry: Entry) -> Record:
        """Return an entry's line in the report."""
        run = entry.run
        return {
            "name": entry.name,
            "role": "original" if run is None else run.role if entry.conditioned else "without",
            "steps": run.steps if run else 0,
            "guidance": run.guidance if run else 1.0,
            "nfe": run.nfe if run else 0,
            "seconds_per_image": self.measured.seconds(entry.name) / self.options.samples,
            "figures": {key: asdict(estimate) for key, estimate in self.estimates[entry.name].items()},
            "seeds": self.measured.spread(entry.name),
        }

    def targets(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Return the targets of :func:`targets_of`, where the targets apply."""
        if not self._has_targets():
            return []
        return targets_of(self.estimates, self.comparisons, self.many.name)

    def notes(self, records: Sequence[Record]) -> list[str]:
        """Return what limits the figures, the student's sampler, and why figures and targets were left out."""
        notes = list(self.about.notes)
        notes += sampler_note(self.teacher, FEW_STEPS) if self.student is not None else []
        notes += interval_note(self.many)
        notes += self._too_few_samples()
        if stored := [str(each.reference) for each in self.sample_sets if each.is_stored]:
            notes.append(
                f"The teacher’s answers come from {', '.join(stored)}, made by an earlier evaluation of the same "
                "teacher on the same samples. So do its seconds there."
            )
        if any(figure.key == "lpips" for figure in self.task.figures) and self.maker.perceptual is None:
            notes.append("LPIPS was not measured. Give VGG-16’s weights with --vgg.")
        return notes

    def facts(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return task, figures, comparisons, origin, settings, environment and pictures."""
        return {
            "task": self.task.name,
            "teacher": self.teacher.name,
            "many": self.many.name,
            "put_back": type(self.task).finished is not Task.finished,
            "figures": [asdict(figure) for figure in self.measured.figures],
            "comparisons": self.comparisons,
            "curve": self._curve(),
            "kinds": {"features": self.network.title, "states": TeacherStates.title, "random": RandomFeatures.title},
            "origin": {
                "data": self.sample_sets[0].subjects.origin,
                "task_options": self.task.options.model_dump(mode="json"),
                **self.origin,
            },
            "settings": {
                name: value for name, value in asdict(self.options).items() if name not in ("times", "solver")
            },
            "inputs": {"features": self.network.title, "dimensions": self.dimensions, "samples_needed": self.enough},
            "sampling": sampler_facts(self.teacher, FEW_STEPS, self.options.solver),
            "environment": environment(self.teacher.device),
            "pictures": self.shown.save(self.output, self.sample_sets[0].seen, [entry.name for entry in self.entries]),
        }

    def _curve(self) -> list[dict[str, Any]]:
        """Return whether the student's distance falls with every step; empty without a student, or of too few."""
        if self.measured.mean is None or self.student is None:
            return []
        return curves_of(self.measured.mean, {kind: key for key, kind in KIND_OF.items()})

    def _has_targets(self) -> bool:
        return self.about.has_targets and self.options.samples >= FEWEST_SAMPLES

    def _too_few_samples(self) -> list[str]:
        """Return what the number of samples is too small for, a sentence each."""
        samples, found = self.options.samples, []
        if samples < FEWEST_SAMPLES:
            found.append(
                f"{samples} samples are too few: the intervals are too narrow, and there are no targets. They are "
                f"usable from --samples {FEWEST_SAMPLES} on."
            )
        if not self.measures_sets:
            found.append(
                f"Fréchet distances and targets were left out: {samples} samples are too few for {self.dimensions} "
                f"features, and a distance would be mostly its own bias. Use --samples {self.enough} or more."
            )
        return found

    # -- making pictures ---------------------------------------------------------------------------------------------

    def passes(self, made: Collection[str], *, of_student: bool = True) -> int:
        """Return the passes per sample of the runs that are not made yet, see :meth:`answer_all`."""
        draws_independent = self.measures_sets and INDEPENDENT not in made
        runs = [entry.run for entry in self._missing(made, of_student) if entry.run]
        return sum(run.nfe for run in runs) + draws_independent * self.many.nfe

    def answer_all(
        self,
        sample_set: SampleSet,
        made: Collection[str],
        progress: Progress,
        bar: TaskID,
        *,
        of_student: bool = True,
    ) -> None:
        """Let all runs that are not made yet answer a set of samples; store the teacher's answers if they are new.

        Args:
            made: names of the runs whose answers the set has already.
            of_student: False lets only the teacher answer.
        """
        maker, is_first = self.maker, sample_set is self.sample_sets[0]
        entries, passes = self._missing(made, of_student), self.passes(made, of_student=of_student)
        for batch in maker.batches(sample_set):
            rows, scene = maker.encode(batch)
            if is_first and not self.shown.captions:
                maker.warm_up(rows, batch)
            for entry in entries:
                maker.answer(sample_set, entry, rows, scene, batch)
            if self.measures_sets and INDEPENDENT not in made:
                maker.answer_independently(sample_set, rows, scene, batch)
            progress.advance(bar, passes * len(batch))
            if is_first:
                self.shown.keep(self.task, batch, scene, self.options.pictures)
        if sample_set.reference is not None and not made:
            save_answers(sample_set.reference, self.reference_origin(sample_set), self.of_teacher(sample_set))

    def _missing(self, made: Collection[str], of_student: bool) -> list[Entry]:
        entries = self.entries if of_student else [entry for entry in self.entries if entry.of_teacher]
        return [entry for entry in entries if entry.name not in made]

    # -- the teacher's answers, stored -------------------------------------------------------------------------------

    def of_teacher(self, sample_set: SampleSet) -> dict[str, Answers]:
        """Return the answers that no student changes, by name."""
        found = {entry.name: sample_set.seen[entry.name] for entry in self.entries if entry.of_teacher}
        return found | ({INDEPENDENT: sample_set.independent} if self.measures_sets else {})

    def stored(self, sample_set: SampleSet) -> dict[str, Answers]:
        """Take over the teacher's answers from the set's file, and return them; nothing where there is no file."""
        if sample_set.reference is None:
            return {}
        origin = self.reference_origin(sample_set)
        found = find_answers(sample_set.reference, origin, self.of_teacher(sample_set))
        sample_set.is_stored = bool(found)
        sample_set.independent = found.get(INDEPENDENT, sample_set.independent)
        sample_set.seen |= {name: answers for name, answers in found.items() if name != INDEPENDENT}
        return found

    def reference_origin(self, sample_set: SampleSet) -> dict[str, Any]:
        """Return everything that the teacher's answers depend on."""
        options, control = self.options, self.teacher.denoiser.control
        return {
            "version": __version__,
            **{name: value for name, value in self.origin.items() if name != "lora"},
            "task": self.task.name,
            "control": None if control is None else [weights_hash(control.network), control.scale],
            "task options": self.task.options.model_dump(mode="json"),
            "subjects": sample_set.subjects.fingerprint(),
            "resolution": list(self.teacher.resolution),
            "solver": options.solver or default_solver(self.teacher.denoiser.process),
            "interval": options.interval and list(options.interval),
            "seed": sample_set.seed,
            **{name: getattr(options, name) for name in ("samples", "steps", "guidance", "pictures")},
            "measures sets": self.measures_sets,
        }

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _comparisons(self) -> list[dict[str, Any]]:
        """Compare each of the student's runs with the undistilled teacher's runs of as many passes, in each figure."""
        pairs = [(steps, SamplingSetting("teacher", steps)) for steps in FEW_STEPS]
        if self.options.guidance != 1:
            pairs += [(2 * steps, SamplingSetting("teacher", steps, self.options.guidance)) for steps in GUIDED_STEPS]
        names = [(SamplingSetting("student", steps).name, rival.name) for steps, rival in pairs]
        return [self._difference(figure, *pair) for pair in names for figure in self.measured.figures]

    def _difference(self, figure: Figure, student: str, rival: str) -> dict[str, Any]:
        found = self.measured.difference(figure, student, rival)
        return {"figure": figure.key, "run": student, "rival": rival, **asdict(found), "verdict": verdict(found)}
