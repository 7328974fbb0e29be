"""Compare a student's few steps with its teacher's many steps, in numbers and in pictures; no data set is needed.

``reference.py`` defines the reference sets and the floor, ``metrics/distances.py`` the distances, ``generate.py`` makes
the pictures. This file decides the runs and the targets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import fingerprint, fingerprint_texts
from ..metrics.distances import diversity, frechet_distance, kernel_distance, paired_distance, prompt_accuracy
from .evaluator import Evaluator, Record, SeesPictures, environment, progress_bar, save_pictures
from .generate import PictureMaker, SamplingSetting, decode_pictures, default_solver, sample_latents, sampler_note
from .reference import Draw, FeatureSet, Origin, Reference, draw
from .request import FEW_STEPS, Options, TeacherComparisonRequest, read_prompts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from torch import Tensor

logger = logging.getLogger(__name__)

REFERENCE = "reference.safetensors"
# The project's targets for its demo, by the student's steps. The student's Fréchet distance is at most so many times
# the floor; and the student closes at least this share of the gap between the undistilled teacher and the floor.
FLOOR_LIMITS = {4: 1.5, 2: 3.0, 1: 6.0}
GAP_LIMITS = {4: 0.4, 2: 0.8, 1: 0.9}
NO_GAP_BELOW = 1.5  # times the floor: an undistilled teacher closer than that leaves no gap worth closing
# Features of pictures made again may differ from the stored features by this share of the set's spread: arithmetic
# differs a little between machines, and by far more where anything else has changed.
LIVE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Measured:
    """A run's pictures in feature space, the first pictures themselves as (K, 3, H, W) in [0, 1], and their cost."""

    set: FeatureSet
    pictures: Tensor
    seconds_per_image: float


@dataclass(frozen=True)
class Gap:
    """A student beside the undistilled teacher with as many passes: Fréchet distances, and the floor."""

    steps: int
    student: float
    undistilled: float
    floor: float

    @property
    def closed(self) -> float | None:
        """(undistilled - student) / (undistilled - floor): 1 = at the floor. None where there is no gap."""
        gap = self.undistilled - self.floor
        return (self.undistilled - self.student) / gap if gap > 0 else None

    @property
    def times_closer(self) -> float:
        """undistilled / student."""
        return self.undistilled / self.student

    @property
    def has_target(self) -> bool:
        """Whether the undistilled teacher is far enough from the floor."""
        return self.undistilled >= NO_GAP_BELOW * self.floor


def few_step_runs(guidance: float) -> list[SamplingSetting]:
    """Return the undistilled teacher's runs in the student's numbers of steps, with guidance and without."""
    return [SamplingSetting("teacher", steps, scale) for scale in (guidance, 1.0) for steps in FEW_STEPS]


def compare_with_teacher(request: TeacherComparisonRequest, console: Console) -> bool:
    """Do what the request asks for. Return whether there is a report: not where only the reference was made."""
    from ..metrics.feature_network import FeatureNetwork

    model = request.model.load(request.model.pick_device())
    network = FeatureNetwork.from_pretrained(request.features).to(model.teacher.device)
    comparison = TeacherComparison(
        model.teacher,
        network,
        read_prompts(request.prompts) if request.prompts else network.general,
        request.options,
        teacher=model.weights,
        features=fingerprint(request.features),
        output=request.output,
        student=model.student,
        references=[request.reference, request.output / REFERENCE],
    )
    if not request.make_reference:
        comparison.evaluate(console)
        return True
    reference = comparison.write_reference(request.reference, console)
    floor = frechet_distance(reference.second.features, reference.first.features)
    console.print(f"reference {request.reference}: the floor's Fréchet distance is {floor:.4g}", soft_wrap=True)
    return False


class TeacherComparison(Evaluator[SamplingSetting]):
    """The student in 4, 2 and 1 steps beside the teacher in many steps and in few.

    Every run is generated from ``samples``; its distribution is measured against ``independent``.

    Args:
        teacher, features: fingerprints of the weights, see :func:`~..files.fingerprint`.
        student: the student's title in the report; None evaluates the teacher alone.
        references: reference files to try in turn. Where none fits, all of the teacher's sets are made anew (which
            costs many times the student's sets) and kept in ``output``, with a message that says why.
    """

    kind = "teacher"

    def __init__(
        self,
        maker: PictureMaker,
        network: SeesPictures,
        prompts: Sequence[str],
        options: Options,
        *,
        teacher: str,
        features: str,
        output: Path,
        student: str | None = None,
        references: Sequence[Path] = (),
    ) -> None:
        super().__init__(output, student)
        self.maker = maker
        self.network = network
        self.options = options
        self.references = references
        self.many = SamplingSetting("teacher", options.steps, options.guidance)
        self.teacher_runs = list(dict.fromkeys([self.many, *few_step_runs(options.guidance)]))
        self.student_runs = [SamplingSetting("student", steps) for steps in FEW_STEPS] if student is not None else []
        self.independent = draw(prompts, options.samples, options.seed, 0, options.times)
        self.samples = draw(prompts, options.samples, options.seed, 1)
        self.classes = [fitting_classes(network, prompt) for prompt in self.samples.prompts]
        self.origin = Origin(
            teacher=teacher,
            features=features,
            prompts=fingerprint_texts(prompts),
            samples=options.samples,
            times=options.times,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            solver=options.solver or default_solver(maker.denoiser.process),
        )
        self.pictures: dict[str, list[str]] = {}

    def runs(self) -> list[SamplingSetting]:
        """Return the teacher's many steps, the student's runs, the undistilled teacher's runs."""
        return [self.many, *self.student_runs, *self.teacher_runs[1:]]

    def prepare(self) -> None:
        """Make the teacher's shown pictures, and find a reference that agrees with them; else make the reference."""
        self.shown = shown_rows(self.samples.prompts, self.options.pictures)
        self.bar = self._start_bar()
        self.expect(self.bar, sum(run.nfe for run in self.teacher_runs) * len(self.shown))
        self.expect(self.bar, sum(run.nfe for run in self.student_runs) * len(self.samples))
        self._warm_up()
        shown = self.samples.rows(self.shown)
        self.live = {run: self.make(run, shown, range(len(self.shown))) for run in self.teacher_runs}
        reference = find_reference(self.references, self.origin)
        if reference is not None and (problem := self.not_reproduced(reference)):
            logger.warning(
                "The stored reference differs from the pictures made here: %s. The reference is made anew.", problem
            )
            reference = None
        self.was_stored = reference is not None
        if reference is None:
            reference = self.make_reference()
            reference.save(self.output / REFERENCE)
        self.reference = reference

    def measure(self, run: SamplingSetting) -> Record:
        """Measure a run; distances are in units of the feature network."""
        if run.role == "student":
            made = self.make(run, self.samples, self.shown)
            seen: FeatureSet | None = made.set
        else:
            made, seen = self.live[run], self._stored(self.reference, run)
        assert seen is not None  # a reference that lacks a run was not taken
        self.pictures[run.name] = save_pictures(made.pictures, self.output, run.name)
        return {
            "name": run.name,
            "steps": run.steps,
            "guidance": run.guidance,
            "nfe": run.nfe,
            "fd": frechet_distance(seen.features, self.reference.first.features),
            "kid": kernel_distance(seen.features, self.reference.first.features),
            "paired": paired_distance(seen.features, self.reference.second.features),
            "prompt_accuracy": prompt_accuracy(seen.predicted, self.classes),
            "diversity": diversity(seen.features, self.samples.prompts),
            "seconds_per_image": made.seconds_per_image,
        }

    def targets(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Return the targets of :func:`targets_of`."""
        return targets_of(gaps_of(records))

    def notes(self, records: Sequence[Record]) -> list[str]:
        """Return the student's sampler, and the reason for each target that was left out."""
        if self.student is None:
            return []
        return sampler_note(self.maker, FEW_STEPS) + left_out(gaps_of(records))

    def facts(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return floor, gaps, reference, settings, environment and pictures."""
        gaps = gaps_of(records) if self.student is not None else []
        return {
            "floor": {name: records[0][name] for name in ("fd", "kid")},
            "gaps": [{**asdict(gap), "closed": gap.closed, "times_closer": gap.times_closer} for gap in gaps],
            "reference": {
                **asdict(self.origin),
                "distinct_prompts": len(set(self.samples.prompts)),
                "stored": self.was_stored,
            },
            "settings": asdict(self.options),
            "environment": environment(self.maker.device),
            "pictures": {"prompts": [self.samples.prompts[row] for row in self.shown], "files": self.pictures},
        }

    # -- making pictures ---------------------------------------------------------------------------------------------

    def make(self, run: SamplingSetting, samples: Draw, shown: Sequence[int] = (), name: str | None = None) -> Measured:
        """Make pictures of ``samples``, show all of them to the feature network, keep the pictures at ``shown``.

        The time counts text encoder, network and decoder, not the metrics.
        """
        import torch

        self.progress.update(self.bar, description=name or run.name)
        features, predicted, pictures, seconds = [], [], [], 0.0
        size = self.options.batch_size
        for begin in range(0, len(samples), size):
            batch = samples.rows(range(begin, min(begin + size, len(samples))))
            start = time.perf_counter()
            latents = sample_latents(self.maker, run, batch.prompts, batch.seeds, self.options.solver)
            images = decode_pictures(self.maker, latents)
            seconds += time.perf_counter() - start
            with torch.inference_mode():
                embedding, scores = self.network(images.to(self.maker.device))
            features.append(embedding.float().cpu())
            predicted.append(scores.argmax(1).cpu())
            pictures += [images[row - begin] for row in shown if begin <= row < begin + size]
            self.progress.advance(self.bar, run.nfe * len(batch))
        return Measured(
            FeatureSet(torch.cat(features), torch.cat(predicted)),
            torch.stack(pictures) if pictures else torch.empty(0),
            seconds / len(samples),
        )

    def write_reference(self, path: Path, console: Console | None) -> Reference:
        """Make all of the teacher's sets and write them to ``path``."""
        with progress_bar(console) as self.progress:
            self.bar = self._start_bar()
            reference = self.make_reference()
        reference.save(path)
        return reference

    def make_reference(self) -> Reference:
        """Make all of the teacher's sets, at the full price."""
        passes = self.many.nfe * len(self.independent) + sum(run.nfe for run in self.teacher_runs) * len(self.samples)
        self.expect(self.bar, passes)
        first = self.make(self.many, self.independent, name="teacher, independent set").set
        made = {run: self.make(run, self.samples).set for run in self.teacher_runs}
        second = made.pop(self.many)
        return Reference(self.origin, first, second, {run.name: features for run, features in made.items()})

    def not_reproduced(self, reference: Reference) -> str | None:
        """Return why stored sets differ from the pictures that this machine makes, or None."""
        for run, made in self.live.items():
            if (stored := self._stored(reference, run)) is None:
                return f"it lacks the run {run.name}"
            spread = (stored.features - stored.features.mean(0)).norm(dim=1).mean().item()
            off = paired_distance(made.set.features, stored.features[self.shown])
            if off > LIVE_TOLERANCE * spread:
                return f"{run.name} made again lies {off:.3g} from the stored set, whose spread is {spread:.3g}"
        return None

    def _stored(self, reference: Reference, run: SamplingSetting) -> FeatureSet | None:
        return reference.second if run == self.many else reference.few.get(run.name)

    def _start_bar(self) -> TaskID:
        return self.progress.add_task("", total=0, unit="passes")

    def _warm_up(self) -> None:
        """Make one picture untimed: a first call allocates memory and loads kernels."""
        one = self.samples.rows([0])
        decode_pictures(self.maker, sample_latents(self.maker, SamplingSetting("teacher", 1), one.prompts, one.seeds))


def shown_rows(prompts: Sequence[str], count: int) -> list[int]:
    """Return the samples that the report shows: the first sample of each of the first ``count`` prompts, none chosen.

    Where prompts are fewer than pictures, other samples follow. At least two, since distances are measured on them.
    """
    first = [row for row, prompt in enumerate(prompts) if prompt not in prompts[:row]]
    others = [row for row in range(len(prompts)) if row not in first]
    return [*first, *others][: max(2, count)]


def find_reference(paths: Sequence[Path], wanted: Origin) -> Reference | None:
    """Return the first stored reference that fits; log why each other file does not fit."""
    for path in paths:
        if not path.is_file():
            logger.info("There is no reference at %s.", path)
            continue
        reference = Reference.load(path)
        if (mismatch := reference.mismatch(wanted)) is None:
            return reference.head(wanted.samples)
        logger.warning("The reference %s does not fit this evaluation: %s.", path, mismatch)
    return None


def fitting_classes(network: SeesPictures, prompt: str) -> set[int]:
    """Return the classes that a prompt names, by their own name or by a general caption."""
    names = zip(network.classes, network.general, strict=True)
    return {index for index, (name, general) in enumerate(names) if prompt in (name, general)}


def gaps_of(records: Sequence[Mapping[str, Any]]) -> list[Gap]:
    """Return the gaps of the student's runs. The first record is the teacher's many steps, which score the floor."""
    fd = {line["name"]: line["fd"] for line in records}
    pairs = [(steps, SamplingSetting("student", steps), SamplingSetting("teacher", steps)) for steps in FEW_STEPS]
    return [Gap(steps, fd[student.name], fd[rival.name], records[0]["fd"]) for steps, student, rival in pairs]


def targets_of(gaps: Sequence[Gap]) -> list[dict[str, Any]]:
    """Return the project's targets with the values that came out.

    - ``floor``: the student's Fréchet distance / the floor is at most ``FLOOR_LIMITS``.
    - ``gap``: the share of the gap closed is at least ``GAP_LIMITS``, where the undistilled teacher leaves a gap.

    The floor is the Fréchet distance of two independent sets of the teacher's own, above 0.
    """
    found: list[dict[str, Any]] = []
    for gap in gaps:
        value, limit = gap.student / gap.floor, FLOOR_LIMITS[gap.steps]
        line = {"run": SamplingSetting("student", gap.steps).name, "kind": "floor", "measure": "times the floor"}
        found.append({**line, "value": value, "at_most": limit, "met": value <= limit})
    for gap in gaps:
        closed, limit = gap.closed, GAP_LIMITS[gap.steps]
        if closed is None or not gap.has_target:
            continue
        rival = SamplingSetting("teacher", gap.steps).name
        measure = f"of the gap closed between {rival} without guidance and the floor"
        line = {"run": SamplingSetting("student", gap.steps).name, "kind": "gap", "measure": measure}
        found.append({**line, "value": closed, "at_least": limit, "met": closed >= limit})
    return found


def left_out(gaps: Sequence[Gap]) -> list[str]:
    """Return why a step count has no target for the gap, one sentence each."""
    return [
        f"Student, {gap.steps} step{'s' * (gap.steps > 1)}: no target for the gap closed. The undistilled teacher with "
        f"as many passes already lies at {gap.undistilled / gap.floor:.2f} x the floor, below {NO_GAP_BELOW:g} x."
        for gap in gaps
        if not gap.has_target
    ]
