"""Compare a student with its teacher on a conditional task: inpainting, super-resolution, face-swap, control.

Each sample has its own conditions, caption and noise, which all runs share: the teacher in many steps, the student in
few steps, the undistilled teacher in few steps. The task defines the figures (``tasks/figures.py``). This file decides
the runs and the targets.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..metrics import confidence_intervals as bootstrap
from ..metrics.confidence_intervals import Estimate
from ..metrics.embedders import Features, load_features, samples_needed
from ..metrics.pictures.random_features import RandomFeatures
from ..metrics.pictures.teacher_states import TeacherStates
from ..tasks.base import Task
from ..tasks.figures import Figure, Scene
from ..tasks.scores import distance
from .evaluator import Evaluator, Record, SeesPictures, environment, save_pictures
from .generate import EncodedPrompts, SamplingSetting, decode_pictures, sample_latents, sampler_facts, sampler_note
from .request import FEW_STEPS, GUIDED_STEPS, Options, TaskComparisonRequest
from .task.figures import OF_SETS, PAIRED
from .task.sets import SetDistances
from .task.targets import targets_of, verdict
from .task_samples import Batch, Subjects, batches, read_subjects

if TYPE_CHECKING:
    from rich.console import Console

    from ..teachers.base import Teacher

logger = logging.getLogger(__name__)

FEWEST_SAMPLES = 32  # for targets: of fewer samples the bootstrap's intervals are too narrow
YARDSTICK = "the originals"


@dataclass(frozen=True)
class Entry:
    """One run, with its line in the report.

    Attributes:
        name: in tables.
        run: the sampling setting; None = the originals after the autoencoder.
        conditioned: whether the run sees the task's conditions.
    """

    name: str
    run: SamplingSetting | None
    conditioned: bool = True


@dataclass
class Seen:
    """What is kept of an entry's pictures."""

    kinds: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    scores: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    pictures: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def keep(self, kinds: Mapping[str, Tensor]) -> None:
        """Keep the features of further pictures."""
        for kind, values in kinds.items():
            self.kinds[kind].append(values)

    def features(self) -> dict[str, Tensor]:
        """Return the features of all pictures (N, D) by their kind."""
        return {kind: torch.cat(parts) for kind, parts in self.kinds.items()}


def entries_of(task: Task, options: Options, student: bool) -> list[Entry]:
    """Return the runs: the yardsticks first, then the student, then the undistilled teacher.

    The undistilled teacher runs in as many steps without guidance, and in half the steps with guidance: as many passes.
    """
    many = SamplingSetting("teacher", options.steps, options.guidance)
    runs = [many]
    if student:
        runs += [SamplingSetting("student", steps) for steps in FEW_STEPS]
    runs += [SamplingSetting("teacher", steps) for steps in FEW_STEPS]
    runs += [SamplingSetting("teacher", steps, options.guidance) for steps in GUIDED_STEPS]
    entries = [Entry(YARDSTICK, None), *(Entry(run.name, run) for run in dict.fromkeys(runs))]
    if task.without:
        entries.append(Entry(f"{many.name}, {task.without}", many, conditioned=False))
    return entries


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
            "lora": str(request.model.lora) if request.model.lora else None,
            "model": list(request.model.fields),
        },
        about=about_task(features, request.model.is_demo, subjects),
    )


@dataclass(frozen=True)
class AboutTask:
    """What follows from a comparison's inputs.

    Attributes:
        has_targets: whether the project's targets apply: they were set for the demo's teacher on the demo's pictures.
        notes: sentences on the inputs that a reader must know.
    """

    has_targets: bool = True
    notes: tuple[str, ...] = ()


def about_task(features: Features, is_demo: bool, subjects: Subjects) -> AboutTask:
    """Return what the feature network, the teacher and the pictures mean for the report."""
    notes = []
    if features.of_demo and not subjects.of_demo:
        notes.append(
            f"All distances and cosines of features come from {features.title}, which has seen only the demo’s "
            "pictures. It is not meant for photographs: trust PSNR, seams, edges, LPIPS and the pictures, or give "
            "--features the weights file of FID’s Inception or the folder of a CLIP."
        )
    has_targets = is_demo and features.of_demo and subjects.of_demo
    if not has_targets:
        notes.append("There are no targets: the project’s targets were set for the demo’s teacher on its pictures.")
    return AboutTask(has_targets, tuple(notes))


class TaskComparison(Evaluator[Entry]):
    """All runs on the same samples, batch after batch: memory does not grow with the number of samples' pixels.

    Args:
        student: the student's title in the report; None evaluates the teacher alone.
        perceptual: LPIPS of pictures (B, 3, H, W) in [0, 1]; None leaves LPIPS out.
        origin: further entries of the report's origin.
        about: what follows from the inputs.
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
        self.entries = entries_of(task, options, student is not None)
        self.many = SamplingSetting("teacher", options.steps, options.guidance)
        blank = torch.ones(1, 3, *teacher.resolution)
        self.dimensions = self.look(blank).shape[1]
        self.enough = samples_needed(self.dimensions)
        self.measures_sets = options.samples >= self.enough
        self.random = RandomFeatures()
        for note in self._too_few_samples():
            logger.warning("%s", note)
        self.seen = {entry.name: Seen() for entry in self.entries}
        self.independent = Seen()
        self.sets: SetDistances | None = None
        self.captions: list[str] = []
        self.drawn: dict[str, list[Tensor]] = defaultdict(list)
        self.originals: list[Tensor] = []

    def runs(self) -> list[Entry]:
        """Return the entries of :func:`entries_of`."""
        return self.entries

    def prepare(self) -> None:
        """Make and score the pictures of all runs."""
        options, many = self.options, self.many
        passes = sum(entry.run.nfe for entry in self.entries if entry.run) + self.measures_sets * many.nfe
        bar = self.progress.add_task(self.task.name, total=passes * options.samples, unit="passes")
        with torch.inference_mode():
            for batch in batches(
                self.subjects, self.task, self.teacher.resolution, options.samples, options.seed, options.batch_size
            ):
                rows, scene = self.encode(batch)
                if not self.captions:  # a first call allocates memory and loads kernels
                    sample_latents(rows, SamplingSetting("teacher", 1), rows.prompts, batch.seeds)
                for entry in self.entries:
                    self._answer(entry, rows, scene, batch)
                    self.progress.advance(bar, entry.run.nfe * len(batch) if entry.run else 0)
                if self.measures_sets:
                    latents = sample_latents(rows, many, rows.prompts, batch.independent)
                    finished = self.task.finished(decode_pictures(rows, latents), scene)
                    self.independent.keep(self._kinds(rows, latents, finished))
                    self.progress.advance(bar, many.nfe * len(batch))
                self._keep(batch, scene)
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
        notes += self._too_few_samples()
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

    # -- making pictures ---------------------------------------------------------------------------------------------

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
            latents = sample_latents(rows, entry.run, rows.prompts, batch.seeds)
        made = decode_pictures(rows, latents)
        seen = self.seen[entry.name]
        seen.seconds += time.perf_counter() - start
        finished = self.task.finished(made, scene)
        seen.keep(self._kinds(scene_rows, latents, finished))
        for key, values in self.task.scores(made, scene).items():
            seen.scores[key].append(values)
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
