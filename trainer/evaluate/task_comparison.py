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
from ..metrics.distances import frechet_distance
from ..metrics.embedders import Features, load_features, samples_needed
from ..tasks.base import Task
from ..tasks.figures import Figure, Scene
from ..tasks.scores import distance
from .evaluator import Evaluator, Record, SeesPictures, environment, save_pictures
from .generate import EncodedPrompts, SamplingSetting, decode_pictures, sample_latents, sampler_facts, sampler_note
from .request import FEW_STEPS, Options, TaskComparisonRequest
from .task_samples import Batch, Subjects, batches, read_subjects

if TYPE_CHECKING:
    from rich.console import Console

    from ..teachers.base import Teacher

logger = logging.getLogger(__name__)

BEST_STEPS = 4  # of the student that has targets
FEWEST_SAMPLES = 32  # for targets: of fewer samples the bootstrap's intervals are too narrow
WITHIN = 0.1  # share of the teacher's many-step figure that the student may fall short
YARDSTICK = "the originals"
FRECHET = Figure(
    "fd",
    "Fréchet distance to the teacher’s pictures",
    "FD",
    "Distance between the set of results and an independent set of the teacher’s many-step results, with the same "
    "conditions and other noise. The teacher’s own figure is the floor: two sets of its own pictures.",
    higher_is_better=False,
)
FRECHET_ORIGINALS = Figure(
    "fd_originals",
    "Fréchet distance to the originals",
    "FD orig.",
    "Distance between the set of results and the originals after the autoencoder. Not a target: guidance moves the "
    "teacher itself away from the originals.",
    higher_is_better=False,
    judged=False,
)
PAIRED = Figure(
    "paired",
    "Feature distance to the teacher’s result",
    "to teacher",
    "Mean distance between a result and the teacher’s many-step result for the same conditions and noise; 0 = the same "
    "picture. Not a target: after its first step the student draws fresh noise, so it makes another picture, not a "
    "worse one.",
    higher_is_better=False,
    judged=False,
)


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

    features: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    pictures: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0


def entries_of(task: Task, options: Options, student: bool) -> list[Entry]:
    """Return the runs: the yardsticks first, then the student, then the undistilled teacher.

    The undistilled teacher runs in as many steps without guidance (as many passes), in as many steps with guidance
    (twice the passes), and in half the steps with guidance (as many passes again).
    """
    many = SamplingSetting("teacher", options.steps, options.guidance)
    runs = [many]
    if student:
        runs += [SamplingSetting("student", steps) for steps in FEW_STEPS]
    runs += [SamplingSetting("teacher", steps) for steps in FEW_STEPS]
    runs += [SamplingSetting("teacher", steps, options.guidance) for steps in (BEST_STEPS, BEST_STEPS // 2)]
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
        self.measures_sets = task.many_answers and options.samples >= self.enough
        for note in self._too_few_samples():
            logger.warning("%s", note)
        self.seen = {entry.name: Seen() for entry in self.entries}
        self.independent: list[Tensor] = []
        self.distances: dict[tuple[str, str], Tensor] = {}
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
                    self.independent.append(self.look(finished))
                    self.progress.advance(bar, many.nfe * len(batch))
                self._keep(batch, scene)
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
        student = SamplingSetting("student", BEST_STEPS).name
        return targets_of(self.figures, self.estimates, self.comparisons, student, self.many.name, self._gaps())

    def notes(self, records: Sequence[Record]) -> list[str]:
        """Return what limits the figures, the student's sampler, and why figures and targets were left out."""
        notes = list(self.about.notes)
        notes += sampler_note(self.teacher, FEW_STEPS) if self.student is not None else []
        notes += self._too_few_samples()
        if self.student is not None and self._has_targets():
            notes += left_out(self.figures, self._gaps())
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
        if self.task.many_answers and not self.measures_sets:
            found.append(
                f"The Fréchet distances were left out: {samples} samples are too few for {self.dimensions} features, "
                f"and a distance would be mostly its own bias. Use --samples {self.enough} or more."
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
        seen.features.append(self.look(finished))
        for key, values in self.task.scores(made, scene).items():
            seen.scores[key].append(values)
        seen.pictures += list(finished[: max(self.options.pictures - len(seen.pictures), 0)])

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
        return [*([FRECHET, FRECHET_ORIGINALS] if self.measures_sets else []), *own, PAIRED]

    def _scores(self, name: str, key: str) -> Tensor:
        """Return a figure of every sample (N,)."""
        if key == PAIRED.key:
            return distance(*(torch.cat(self.seen[which].features) for which in (name, self.many.name)))
        return torch.cat(self.seen[name].scores[key])

    def _set_distances(self, name: str, key: str) -> Tensor:
        """Return a Fréchet distance of all samples, then of each resampling of the bootstrap; computed once."""
        if (name, key) not in self.distances:
            features = torch.cat(self.seen[name].features)
            reference = torch.cat(self.independent if key == FRECHET.key else self.seen[YARDSTICK].features)
            self.distances[name, key] = bootstrap.set_values(
                lambda index: frechet_distance(features[index], reference[index]), len(features)
            )
        return self.distances[name, key]

    def _estimates(self, name: str) -> dict[str, Estimate]:
        return {
            figure.key: bootstrap.of_set_values(self._set_distances(name, figure.key), self.options.samples)
            if figure in (FRECHET, FRECHET_ORIGINALS)
            else bootstrap.mean_of(self._scores(name, figure.key))
            for figure in self.figures
        }

    def _comparisons(self) -> list[dict[str, Any]]:
        """Compare the student's best run with each run of the undistilled teacher, in each figure."""
        student = SamplingSetting("student", BEST_STEPS).name
        rivals = [entry.name for entry in self.entries[2:] if entry.run is not None and entry.run.role == "teacher"]
        return [self._difference(figure, student, rival) for rival in rivals for figure in self.figures]

    def _gaps(self) -> dict[str, str]:
        """Return for each figure whether the teacher in many steps is better than the student's rival in few steps."""
        rival = SamplingSetting("teacher", BEST_STEPS).name
        return {figure.key: self._difference(figure, self.many.name, rival)["verdict"] for figure in self.figures}

    def _difference(self, figure: Figure, student: str, rival: str) -> dict[str, Any]:
        """Return by how much a run is better than its rival on the same samples, with its interval."""
        sign = 1 if figure.higher_is_better else -1
        if figure in (FRECHET, FRECHET_ORIGINALS):
            ours, theirs = (self._set_distances(name, figure.key) for name in (student, rival))
            found = bootstrap.of_set_values(sign * (ours - theirs), self.options.samples)
        else:
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


def verdict(difference: Estimate) -> str:
    """Return ``better`` or ``worse`` where the whole interval is on one side of 0, else ``even``."""
    if difference.low is None or difference.high is None:
        return "even"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "even"


def targets_of(
    figures: Sequence[Figure],
    estimates: Mapping[str, Mapping[str, Estimate]],
    comparisons: Sequence[Mapping[str, Any]],
    student: str,
    many: str,
    gaps: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return the student's targets, at most two for every judged figure.

    - ``within``: student / teacher in many steps is at most 1.1 where lower is better, at least 0.9 where higher is
      better. ``value`` is this ratio. There is no such target where the teacher's figure is 0 or below.
    - ``better``: the student is clearly better than the undistilled teacher with as many passes: the 95 % interval of
      the mean difference on the same samples is above 0. ``value`` is this difference, positive = the student is
      better. There is no such target where the teacher in many steps is not clearly better itself: then a student that
      equals its teacher would miss the target.

    Args:
        gaps: by figure the verdict on the teacher in many steps, against the undistilled teacher with as many passes.
    """
    found: list[dict[str, Any]] = []
    rival = SamplingSetting("teacher", BEST_STEPS).name
    for figure in figures:
        ours, theirs = estimates[student][figure.key].value, estimates[many][figure.key].value
        if not figure.judged or ours is None or theirs is None:
            continue
        if theirs > 0:
            least, most = (1 - WITHIN) * theirs, (1 + WITHIN) * theirs
            met = ours >= least if figure.higher_is_better else ours <= most
            limit = {"at_least": 1 - WITHIN} if figure.higher_is_better else {"at_most": 1 + WITHIN}
            line = {"figure": figure.key, "kind": "within", "run": student, "rival": many}
            found.append({**line, "value": ours / theirs, **limit, "met": met})
        if gaps[figure.key] != "better":
            continue
        against = next(line for line in comparisons if (line["figure"], line["rival"]) == (figure.key, rival))
        found.append({**against, "kind": "better", "met": against["verdict"] == "better"})
    return found


def left_out(figures: Sequence[Figure], gaps: Mapping[str, str]) -> list[str]:
    """Return a sentence on the figures whose target ``better`` was left out, if there are such figures."""
    names = [figure.short for figure in figures if figure.judged and gaps[figure.key] != "better"]
    if not names:
        return []
    return [
        f"No target to be better than the undistilled teacher in {', '.join(names)}: there the teacher in many steps "
        "is not clearly better itself, so a perfect student would miss the target."
    ]
