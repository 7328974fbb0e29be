"""Compare a student with its teacher on a conditional task: inpainting, super-resolution, face-swap, control.

Each sample has its own conditions, caption and noise, which all runs share: the teacher in many steps, the student in
few steps, the undistilled teacher in few steps. The task defines the figures (``tasks/figures.py``). This file decides
the runs and the targets.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import __version__
from ...flash_core.measures import confidence_intervals as bootstrap
from ...flash_core.measures.confidence_intervals import Estimate
from ...flash_core.measures.random_features import RandomFeatures
from ..files import file_hash
from ..metrics.embedders import load_features, samples_needed
from ..metrics.pictures.teacher_states import TeacherStates
from ..tasks.base import Task
from ..tasks.figures import Figure, Scene
from ..tasks.scores import distance
from ..teachers.hashes import weights_hash
from .evaluator import Evaluator, Record, SeesPictures, environment, save_pictures
from .generate import (
    EncodedPrompts,
    SamplingSetting,
    decode_pictures,
    default_solver,
    interval_note,
    sample_latents,
    sampler_facts,
    sampler_note,
)
from .request import FEW_STEPS, GUIDED_STEPS, Options, TaskComparisonRequest
from .task.about import AboutTask, about_task
from .task.answers import Answers
from .task.figures import OF_SETS, PAIRED
from .task.runs import INDEPENDENT, YARDSTICK, Entry, entries_of
from .task.sets import SetDistances
from .task.stored import find_answers, save_answers
from .task.targets import targets_of, verdict
from .task_samples import Batch, Subjects, batches, read_subjects

if TYPE_CHECKING:
    from rich.console import Console

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
    subjects = read_subjects(request.data, request.task, options.samples, options.seed)
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
        about=about_task(features, request.model.is_demo, subjects),
        reference=request.reference,
    )


class TaskComparison(Evaluator[Entry]):
    """All runs on the same samples, batch after batch: memory does not grow with the number of samples' pixels.

    Args:
        student: the student's title in the report; None evaluates the teacher alone.
        perceptual: LPIPS of pictures (B, 3, H, W) in [0, 1]; None leaves LPIPS out.
        origin: further entries of the report's origin.
        about: what follows from the inputs.
        reference: file of the teacher's answers: read where it is there, else made. None keeps nothing.
    """

    kind = "task"

    def __init__(
        self,
        teacher: Teacher,
        task: Task,
        subjects: Subjects,
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
        self.subjects = subjects
        self.network = network
        self.options = options
        self.perceptual = perceptual
        self.origin = dict(origin or {})
        self.about = about or AboutTask()
        self.reference = reference
        self.is_stored = False
        self.entries = entries_of(task, options, student is not None)
        self.many = SamplingSetting("teacher", options.steps, options.guidance, options.interval)
        blank = torch.ones(1, 3, *teacher.resolution)
        self.dimensions = self.look(blank).shape[1]
        self.enough = samples_needed(self.dimensions)
        self.measures_sets = options.samples >= self.enough
        self.random = RandomFeatures()
        for note in self._too_few_samples():
            logger.warning("%s", note)
        self.seen = {entry.name: Answers() for entry in self.entries}
        self.independent = Answers()
        self.sets: SetDistances | None = None
        self.captions: list[str] = []
        self.drawn: dict[str, list[Tensor]] = defaultdict(list)
        self.originals: list[Tensor] = []

    def runs(self) -> list[Entry]:
        """Return the entries of :func:`entries_of`."""
        return self.entries

    def prepare(self) -> None:
        """Make and score the pictures of all runs, those of the teacher only where they are not stored."""
        many = self.many
        made = self.stored()
        entries = [entry for entry in self.entries if entry.name not in made]
        draws_independent = self.measures_sets and INDEPENDENT not in made
        passes = sum(entry.run.nfe for entry in entries if entry.run) + draws_independent * many.nfe
        bar = self.progress.add_task(self.task.name, total=passes * self.options.samples, unit="passes")
        with torch.inference_mode():
            for batch in self.batches():
                rows, scene = self.encode(batch)
                if not self.captions:  # a first call allocates memory and loads kernels
                    sample_latents(rows, SamplingSetting("teacher", 1), rows.prompts, batch.seeds)
                for entry in entries:
                    self._answer(entry, rows, scene, batch)
                    self.progress.advance(bar, entry.run.nfe * len(batch) if entry.run else 0)
                if draws_independent:
                    finished, latents = self.independent_results(rows, scene, batch)
                    self.independent.keep(self._kinds(rows, latents, finished))
                    self.progress.advance(bar, many.nfe * len(batch))
                self._keep(batch, scene)
        if self.reference is not None and not made:
            save_answers(self.reference, self.reference_origin(), self._of_teacher())
        if self.measures_sets:
            runs = {name: seen.features() for name, seen in self.seen.items()}
            self.sets = SetDistances(runs, self.independent.features(), runs[YARDSTICK]["features"])
        self.figures = self._figures()
        self.estimates = {entry.name: self._estimates(entry.name) for entry in self.entries}
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
            "seconds_per_image": self.seen[entry.name].seconds / self.options.samples,
            "figures": {key: asdict(estimate) for key, estimate in self.estimates[entry.name].items()},
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
        if self.is_stored:
            notes.append(
                f"The teacher’s answers come from {self.reference}, which an earlier evaluation of the same teacher on "
                "the same samples has made. So do the teacher’s seconds."
            )
        if any(figure.key == "lpips" for figure in self.task.figures) and self.perceptual is None:
            notes.append("LPIPS was not measured. Give VGG-16’s weights with --vgg.")
        return notes

    def facts(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return task, figures, comparisons, origin, settings, environment and pictures."""
        return {
            "task": self.task.name,
            "teacher": self.teacher.name,
            "many": self.many.name,
            "put_back": type(self.task).finished is not Task.finished,
            "figures": [asdict(figure) for figure in self.figures],
            "comparisons": self.comparisons,
            "origin": {
                "data": self.subjects.origin,
                "task_options": self.task.options.model_dump(mode="json"),
                **self.origin,
            },
            "settings": {
                name: value for name, value in asdict(self.options).items() if name not in ("times", "solver")
            },
            "inputs": {"features": self.network.title, "dimensions": self.dimensions, "samples_needed": self.enough},
            "sampling": sampler_facts(self.teacher, FEW_STEPS, self.options.solver),
            "environment": environment(self.teacher.device),
            "pictures": self._save(),
        }

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

    # -- the teacher's answers, stored -------------------------------------------------------------------------------

    def _of_teacher(self) -> dict[str, Answers]:
        """Return the answers that no student changes, by name."""
        found = {
            entry.name: self.seen[entry.name]
            for entry in self.entries
            if entry.run is None or entry.run.role == "teacher"
        }
        return found | ({INDEPENDENT: self.independent} if self.measures_sets else {})

    def stored(self) -> dict[str, Answers]:
        """Take over the teacher's answers from the file, and return them; nothing where there is no file."""
        if self.reference is None:
            return {}
        found = find_answers(self.reference, self.reference_origin(), self._of_teacher())
        self.is_stored = bool(found)
        self.independent = found.get(INDEPENDENT, self.independent)
        self.seen |= {name: answers for name, answers in found.items() if name in self.seen}
        return found

    def reference_origin(self) -> dict[str, Any]:
        """Return everything that the teacher's answers depend on."""
        options, control = self.options, self.teacher.denoiser.control
        return {
            "version": __version__,
            **{name: value for name, value in self.origin.items() if name != "lora"},
            "task": self.task.name,
            "control": None if control is None else [weights_hash(control.network), control.scale],
            "task options": self.task.options.model_dump(mode="json"),
            "subjects": self.subjects.fingerprint(),
            "resolution": list(self.teacher.resolution),
            "solver": options.solver or default_solver(self.teacher.denoiser.process),
            "interval": options.interval and list(options.interval),
            **{name: getattr(options, name) for name in ("samples", "seed", "steps", "guidance", "pictures")},
            "measures sets": self.measures_sets,
        }

    # -- making pictures ---------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """Draw the samples, a batch at a time."""
        options = self.options
        return batches(
            self.subjects, self.task, self.teacher.resolution, options.samples, options.seed, options.batch_size
        )

    def independent_results(self, rows: EncodedPrompts, scene: Scene, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return results of the teacher's many steps with the same conditions and other noise, and their latents."""
        latents = sample_latents(rows, self.many, rows.prompts, batch.independent, self.options.solver)
        return self.task.finished(decode_pictures(rows, latents), scene), latents

    def encode(self, batch: Batch) -> tuple[EncodedPrompts, Scene]:
        """Return the batch's captions and conditions as the model reads them, and what the task's figures need."""
        device = self.teacher.device
        drawn = {name: value.to(device) for name, value in batch.drawn.items()}
        conditioning = self.teacher.encode_prompts(batch.captions).joined(self.task.encode(drawn, self.teacher))
        rows = EncodedPrompts(self.teacher, self.task, batch.captions, conditioning)
        originals, others = batch.images / 2 + 0.5, batch.others / 2 + 0.5
        return rows, Scene(originals, others, batch.drawn, self.look, self.perceptual)

    def _answer(self, entry: Entry, rows: EncodedPrompts, scene: Scene, batch: Batch) -> None:
        scene_rows = rows  # hidden states are those under the task's conditions, whatever the run has seen
        if not entry.conditioned:
            conditioning = self.task.conditions_without(rows.conditioning)
            assert conditioning is not None, f"{self.task.name} says what it is without, and can't be"
            rows = replace(rows, conditioning=conditioning)
        start = time.perf_counter()
        if entry.run is None:
            latents = self.teacher.encode((scene.originals * 2 - 1).to(self.teacher.device))
        else:
            latents = sample_latents(rows, entry.run, rows.prompts, batch.seeds, self.options.solver)
        made = decode_pictures(rows, latents)
        seen = self.seen[entry.name]
        seen.seconds += time.perf_counter() - start
        finished = self.task.finished(made, scene)
        seen.keep(self._kinds(scene_rows, latents, finished), self.task.scores(made, scene))
        seen.pictures += list(finished[: max(self.options.pictures - len(seen.pictures), 0)])

    def _kinds(self, rows: EncodedPrompts, latents: Tensor, finished: Tensor) -> dict[str, Tensor]:
        """Return the features of results by their kind; only the network's own where no sets are compared."""
        found = {"features": self.look(finished)}
        if self.measures_sets:
            states = TeacherStates(rows.denoiser, rows.unconditional)
            found |= {"states": states(latents), "random": self.random(finished)}
        return found

    def look(self, pictures: Tensor) -> Tensor:
        """Return the features (B, D) of pictures in [0, 1]."""
        return self.network(pictures.to(self.teacher.device))[0].float().cpu()

    def _keep(self, batch: Batch, scene: Scene) -> None:
        wanted = max(self.options.pictures - len(self.captions), 0)
        self.captions += batch.captions
        self.originals += list(scene.originals[:wanted])
        for title, pictures in self.task.shown(batch.drawn).items():
            self.drawn[title] += list(pictures[:wanted])

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _figures(self) -> list[Figure]:
        """Return the measured figures: Fréchet distances where there are enough samples, then the task's figures."""
        measured = next(iter(self.seen.values())).scores
        own = [figure for figure in self.task.figures if figure.key in measured]
        return [*(OF_SETS if self.sets is not None else ()), *own, PAIRED]

    def _scores(self, name: str, key: str) -> Tensor:
        """Return a figure of every sample (N,)."""
        if key == PAIRED.key:
            return distance(*(self.seen[which].features()["features"] for which in (name, self.many.name)))
        return torch.cat(self.seen[name].scores[key])

    def _estimates(self, name: str) -> dict[str, Estimate]:
        return {
            figure.key: self.sets.of(name, figure.key)
            if self.sets is not None and figure in OF_SETS
            else bootstrap.mean_of(self._scores(name, figure.key))
            for figure in self.figures
        }

    def _comparisons(self) -> list[dict[str, Any]]:
        """Compare each of the student's runs with the undistilled teacher's runs of as many passes, in each figure."""
        pairs = [(steps, SamplingSetting("teacher", steps)) for steps in FEW_STEPS]
        if self.options.guidance != 1:
            pairs += [(2 * steps, SamplingSetting("teacher", steps, self.options.guidance)) for steps in GUIDED_STEPS]
        names = [(SamplingSetting("student", steps).name, rival.name) for steps, rival in pairs]
        return [self._difference(figure, *pair) for pair in names for figure in self.figures]

    def _difference(self, figure: Figure, student: str, rival: str) -> dict[str, Any]:
        """Return by how much a run is better than its rival on the same samples, with its interval."""
        if self.sets is not None and figure in OF_SETS:
            found = self.sets.difference(student, rival, figure.key)
        else:
            sign = 1 if figure.higher_is_better else -1
            found = bootstrap.mean_of(sign * (self._scores(student, figure.key) - self._scores(rival, figure.key)))
        return {"figure": figure.key, "run": student, "rival": rival, **asdict(found), "verdict": verdict(found)}

    def _save(self) -> dict[str, Any]:
        """Write the pictures that the page shows; return their paths."""

        def write(pictures: Sequence[Tensor], folder: str) -> list[str]:
            return save_pictures(pictures, self.output, folder)

        return {
            "prompts": self.captions[: self.options.pictures],
            "drawn": {title: write(pictures, f"given {title}") for title, pictures in self.drawn.items()},
            "original": write(self.originals, "original"),
            "files": {entry.name: write(self.seen[entry.name].pictures, entry.name) for entry in self.entries},
        }
