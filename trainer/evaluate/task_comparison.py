"""How well a student does its teacher's task in few steps: inpainting, super-resolution, face-swap, control.

Every sample has conditions, a caption and noise of its own, which all runs share: the teacher in many steps, the
student in few, and the undistilled teacher in as few. The task says what is measured of each
picture (``tasks/figures.py``); here it is decided what is run and what a student is held to, and ``report.json`` and
the pictures are written.
"""

from __future__ import annotations

import json
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
from ..tasks.base import Task
from ..tasks.figures import Figure, Scene
from ..tasks.scores import distance
from .generate import EncodedPrompts, SamplingSetting, decode_pictures, sample_latents
from .measure import FEW_STEPS, FeatureNetwork, Options, environment, progress_bar
from .task_samples import Batch, Subjects, batches
from .teacher_comparison import save_pictures

if TYPE_CHECKING:
    from rich.console import Console

    from ..teachers.base import Teacher

logger = logging.getLogger(__name__)

KIND = "task"  # of the report
BEST_STEPS = 4  # of the student that is held to the targets
WITHIN = 0.1  # of the teacher's many-step figure that a student may fall short
YARDSTICK = "the originals"
# From fewer samples a Fréchet distance is mostly its own bias: of 80 of the demo's inpaintings, with 64 features, the
# teacher against itself scored 5.0, in 4 steps without guidance 5.1, and the originals 4.8.
SAMPLES_A_FEATURE = 4
FRECHET = Figure(
    "fd",
    "Fréchet distance to the teacher’s pictures",
    "FD",
    "Between the results as a whole and an independent set of the teacher’s many-step results, of the same conditions "
    "and other noise. The teacher itself, drawing anew, scores the floor, which is its figure here.",
    higher_is_better=False,
)
FRECHET_ORIGINALS = Figure(
    "fd_originals",
    "Fréchet distance to the originals",
    "FD orig.",
    "Between the results as a whole and the originals, these brought through the autoencoder too. Guidance moves the "
    "teacher itself away from them, so a student is not held to it.",
    higher_is_better=False,
    judged=False,
)
PAIRED = Figure(
    "paired",
    "Feature distance to the teacher’s result",
    "to teacher",
    "Mean distance of a result from the one that the teacher makes in many steps of the same conditions and noise. 0 "
    "is the same picture. After its first step a student draws fresh noise, which leads to another picture, not to a "
    "worse one, so it is not held to it.",
    higher_is_better=False,
    judged=False,
)


@dataclass(frozen=True)
class Entry:
    """One way to answer the conditions, with its line in the report.

    Attributes:
        name: what tables call it.
        run: who makes the pictures; None are the originals, brought through the autoencoder.
        conditioned: whether it sees the task's conditions.
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
    """What is compared: the yardsticks first, then the student, then the undistilled teacher.

    The teacher's rivals of the student: as few steps without guidance, which cost as many passes; as few steps with
    guidance, which cost twice as many; and half of them with guidance, as many again.
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


def compare_on_task(
    teacher: Teacher,
    task: Task,
    subjects: Subjects,
    network: FeatureNetwork,
    options: Options,
    *,
    output: Path,
    student: str | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    facts: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run everything, write ``report.json`` and ``pictures/`` into ``output``, and return the report.

    Args:
        student: what the student is called in the report; None evaluates the teacher alone.
        perceptual: LPIPS of pictures (B, 3, H, W) in [0, 1]; None leaves it out.
        facts: further lines of the report's origin.
        console: where the progress bar is drawn; None draws none.
    """
    entries = entries_of(task, options, student is not None)
    comparison = _Comparison(teacher, task, network, options, perceptual, entries)
    comparison.run(subjects, console)
    figures = comparison.figures()
    estimates = {entry.name: comparison.estimates(entry.name, figures) for entry in entries}
    many = entries[1].name
    records = [comparison.record(entry, estimates[entry.name]) for entry in entries]
    report = {
        "kind": KIND,
        "task": task.name,
        "student": student,
        "teacher": teacher.name,
        "many": many,
        "put_back": type(task).finished is not Task.finished,
        "figures": [asdict(figure) for figure in figures],
        "runs": records,
        "targets": [],
        "comparisons": [],
        "notes": comparison.notes(),
        "origin": {"data": subjects.origin, "task_options": task.options.model_dump(mode="json"), **(facts or {})},
        "settings": {name: value for name, value in asdict(options).items() if name not in ("times", "solver")},
        "environment": environment(teacher.device),
        "pictures": comparison.save(output),
    }
    if student is not None:
        held = SamplingSetting("student", BEST_STEPS).name
        rivals = [entry.name for entry in entries[2:] if entry.run is not None and entry.run.role == "teacher"]
        report["comparisons"] = [comparison.difference(figure, held, rival) for rival in rivals for figure in figures]
        report["targets"] = targets(figures, estimates, report["comparisons"], held, many)
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


class _Comparison:
    """The runs at work, batch after batch: what is kept does not grow with the pictures' size."""

    def __init__(
        self,
        teacher: Teacher,
        task: Task,
        network: FeatureNetwork,
        options: Options,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
        entries: Sequence[Entry],
    ) -> None:
        self.teacher = teacher
        self.task = task
        self.network = network
        self.options = options
        self.perceptual = perceptual
        self.entries = entries
        self.many = SamplingSetting("teacher", options.steps, options.guidance)
        blank = torch.ones(1, 3, *teacher.resolution)
        self.enough = SAMPLES_A_FEATURE * self._look(blank).shape[1]  # samples for a distance of sets
        self.measures_sets = task.many_answers and options.samples >= self.enough
        self.seen = {entry.name: Seen() for entry in entries}
        self.independent: list[Tensor] = []
        self.distances: dict[tuple[str, str], Tensor] = {}
        self.captions: list[str] = []
        self.drawn: dict[str, list[Tensor]] = defaultdict(list)
        self.originals: list[Tensor] = []

    # -- making pictures ---------------------------------------------------------------------------------------------

    def run(self, subjects: Subjects, console: Console | None) -> None:
        """Make and measure everything."""
        options, many = self.options, self.many
        passes = sum(entry.run.nfe for entry in self.entries if entry.run) + self.measures_sets * many.nfe
        with progress_bar(console) as progress, torch.inference_mode():
            bar = progress.add_task(self.task.name, total=passes * options.samples, unit="passes")
            for batch in batches(
                subjects, self.task, self.teacher.resolution, options.samples, options.seed, options.batch_size
            ):
                rows, scene = self._encode(batch)
                if not self.captions:  # a first call allocates memory and loads kernels
                    sample_latents(rows, SamplingSetting("teacher", 1), rows.prompts, batch.seeds)
                for entry in self.entries:
                    self._answer(entry, rows, scene, batch)
                    progress.advance(bar, entry.run.nfe * len(batch) if entry.run else 0)
                if self.measures_sets:
                    latents = sample_latents(rows, many, rows.prompts, batch.independent)
                    finished = self.task.finished(decode_pictures(rows, latents), scene)
                    self.independent.append(self._look(finished))
                    progress.advance(bar, many.nfe * len(batch))
                self._keep(batch, scene)

    def _encode(self, batch: Batch) -> tuple[EncodedPrompts, Scene]:
        device = self.teacher.device
        drawn = {name: value.to(device) for name, value in batch.drawn.items()}
        conditioning = self.teacher.encode_prompts(batch.captions).joined(self.task.encode(drawn, self.teacher))
        rows = EncodedPrompts(self.teacher, self.task, batch.captions, conditioning)
        originals, others = batch.images / 2 + 0.5, batch.others / 2 + 0.5
        return rows, Scene(originals, others, batch.drawn, self._look, self.perceptual)

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
        seen.features.append(self._look(finished))
        for key, values in self.task.scores(made, scene).items():
            seen.scores[key].append(values)
        seen.pictures += list(finished[: max(self.options.pictures - len(seen.pictures), 0)])

    def _look(self, pictures: Tensor) -> Tensor:
        return self.network(pictures.to(self.teacher.device))[0].float().cpu()

    def _keep(self, batch: Batch, scene: Scene) -> None:
        wanted = max(self.options.pictures - len(self.captions), 0)
        self.captions += batch.captions
        self.originals += list(scene.originals[:wanted])
        for title, pictures in self.task.shown(batch.drawn).items():
            self.drawn[title] += list(pictures[:wanted])

    # -- measuring ---------------------------------------------------------------------------------------------------

    def figures(self) -> list[Figure]:
        """What was measured: a distance of sets where there are enough samples, then the task's own."""
        measured = next(iter(self.seen.values())).scores
        own = [figure for figure in self.task.figures if figure.key in measured]
        return [*([FRECHET, FRECHET_ORIGINALS] if self.measures_sets else []), *own, PAIRED]

    def notes(self) -> list[str]:
        """What was not measured, and why."""
        notes = []
        if self.task.many_answers and not self.measures_sets:
            notes.append(
                f"The Fréchet distances were left out: {self.options.samples} samples are too few for "
                f"{self.enough // SAMPLES_A_FEATURE} features; --samples {self.enough} or more measures them."
            )
        if any(figure.key == "lpips" for figure in self.task.figures) and self.perceptual is None:
            notes.append("LPIPS was not measured: --vgg with VGG-16’s weights does.")
        return notes

    def scores(self, name: str, key: str) -> Tensor:
        """A figure of every sample (N,)."""
        if key == PAIRED.key:
            return distance(*(torch.cat(self.seen[which].features) for which in (name, self.many.name)))
        return torch.cat(self.seen[name].scores[key])

    def set_distances(self, name: str, key: str) -> Tensor:
        """A distance of sets, of all samples and of those that the bootstrap draws; computed once."""
        if (name, key) not in self.distances:
            features = torch.cat(self.seen[name].features)
            reference = torch.cat(self.independent if key == FRECHET.key else self.seen[YARDSTICK].features)
            self.distances[name, key] = bootstrap.set_values(
                lambda index: frechet_distance(features[index], reference[index]), len(features)
            )
        return self.distances[name, key]

    def estimates(self, name: str, figures: Sequence[Figure]) -> dict[str, Estimate]:
        """Every figure of an entry."""
        return {
            figure.key: bootstrap.of_set_values(self.set_distances(name, figure.key), self.options.samples)
            if figure in (FRECHET, FRECHET_ORIGINALS)
            else bootstrap.mean_of(self.scores(name, figure.key))
            for figure in figures
        }

    def difference(self, figure: Figure, student: str, rival: str) -> dict[str, Any]:
        """By how much the student is better than a rival on the same samples, and how sure that is."""
        sign = 1 if figure.higher_is_better else -1
        if figure in (FRECHET, FRECHET_ORIGINALS):
            ours, theirs = (self.set_distances(name, figure.key) for name in (student, rival))
            found = bootstrap.of_set_values(sign * (ours - theirs), self.options.samples)
        else:
            found = bootstrap.mean_of(sign * (self.scores(student, figure.key) - self.scores(rival, figure.key)))
        return {"figure": figure.key, "run": student, "rival": rival, **asdict(found), "verdict": verdict(found)}

    def record(self, entry: Entry, estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        """An entry's line in the report."""
        run = entry.run
        return {
            "name": entry.name,
            "role": "original" if run is None else run.role if entry.conditioned else "without",
            "steps": run.steps if run else 0,
            "guidance": run.guidance if run else 1.0,
            "nfe": run.nfe if run else 0,
            "seconds_per_image": self.seen[entry.name].seconds / self.options.samples,
            "figures": {key: asdict(estimate) for key, estimate in estimates.items()},
        }

    def save(self, output: Path) -> dict[str, Any]:
        """Write the pictures that the page shows."""

        def write(pictures: Sequence[Tensor], folder: str) -> list[str]:
            return save_pictures(torch.stack(list(pictures)), output, folder)

        return {
            "prompts": self.captions[: self.options.pictures],
            "drawn": {title: write(pictures, f"given {title}") for title, pictures in self.drawn.items()},
            "original": write(self.originals, "original"),
            "files": {entry.name: write(self.seen[entry.name].pictures, entry.name) for entry in self.entries},
        }


def verdict(difference: Estimate) -> str:
    """``better`` or ``worse`` where the whole interval is on one side of 0, else ``even``."""
    if difference.low is None or difference.high is None:
        return "even"
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "even"


def targets(
    figures: Sequence[Figure],
    estimates: Mapping[str, Mapping[str, Estimate]],
    comparisons: Sequence[Mapping[str, Any]],
    student: str,
    many: str,
) -> list[dict[str, Any]]:
    """What a student is held to, in every judged figure.

    - ``within``: its figure is at most 1.1 times the teacher's of many steps where lower is better, at least 0.9 times
      where higher is. ``value`` is that ratio, None where the teacher's figure is 0.
    - ``better``: it is clearly better than the undistilled teacher with as many passes: the 95 % interval of the mean
      difference on the same samples is above 0. ``value`` is that difference, positive where the student is better.
    """
    found: list[dict[str, Any]] = []
    rival = SamplingSetting("teacher", BEST_STEPS).name
    for figure in figures:
        ours, theirs = estimates[student][figure.key].value, estimates[many][figure.key].value
        if not figure.judged or ours is None or theirs is None:
            continue
        slack = WITHIN * abs(theirs)
        met = ours >= theirs - slack if figure.higher_is_better else ours <= theirs + slack
        limit = {"at_least": 1 - WITHIN} if figure.higher_is_better else {"at_most": 1 + WITHIN}
        value = ours / theirs if theirs else None
        line = {"figure": figure.key, "kind": "within", "run": student, "rival": many}
        found.append({**line, "value": value, **limit, "met": met})
        against = next(line for line in comparisons if (line["figure"], line["rival"]) == (figure.key, rival))
        found.append({**against, "kind": "better", "met": against["verdict"] == "better"})
    return found
