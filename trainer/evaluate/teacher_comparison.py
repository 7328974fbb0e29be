"""Compare a student's few steps with its teacher's many steps, in numbers and in pictures; no data set is needed.

``teacher/`` has the captions, the reference sets with the floor, and the targets; ``metrics/`` the distances and the
networks; ``generate.py`` makes the pictures. This file decides the runs.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...flash_core.measures.distances import frechet_distance, paired_distance
from ...flash_core.measures.random_features import RandomFeatures
from ...flash_core.measures.sharpness import contrast, sharpness
from ..files import fingerprint_texts
from ..metrics.embedders import load_features, samples_needed
from ..metrics.pictures.preference import Preference, load_preference
from ..metrics.pictures.teacher_states import TeacherStates
from .curve import curves_of
from .evaluator import Evaluator, Record, SeesPictures, environment, save_pictures
from .generate import (
    PictureMaker,
    SamplingSetting,
    decode_pictures,
    default_solver,
    distinct,
    interval_note,
    sample_latents,
    sampler_facts,
    sampler_note,
)
from .progress import progress_bar
from .request import FEW_STEPS, GUIDED_STEPS, Options, TeacherComparisonRequest
from .teacher.captions import choose_captions
from .teacher.figures import KINDS, Figures
from .teacher.reference import Draw, FeatureSet, Origin, Reference, check_overwrite, draw, find_reference
from .teacher.targets import gaps_of, targets_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from torch import Tensor

logger = logging.getLogger(__name__)

REFERENCE = "reference.safetensors"
# Features of pictures made again may differ from the stored features by this share of the set's spread: arithmetic
# differs a little between machines, and by far more where anything else has changed.
LIVE_TOLERANCE = 0.02
UNNAMED = -1  # class of a picture where the feature network knows no names


@dataclass(frozen=True)
class Measured:
    """A run's pictures in feature space, the first pictures themselves as (K, 3, H, W) in [0, 1], and their cost."""

    set: FeatureSet
    pictures: Tensor
    seconds_per_image: float


@dataclass(frozen=True)
class About:
    """What the report tells of a comparison's inputs, and what follows from them.

    Attributes:
        captions: where the captions come from.
        knows_names: whether the feature network knows what the captions name, so that prompt accuracy means something.
        has_targets: whether the project's targets apply: they were set for the demo's teacher.
        notes: sentences on the inputs that a reader must know.
    """

    captions: str = "the given prompts"
    knows_names: bool = True
    has_targets: bool = True
    notes: tuple[str, ...] = ()


def few_step_runs(guidance: float) -> list[SamplingSetting]:
    """Return the undistilled teacher's runs in the student's numbers of passes, without guidance and with guidance."""
    plain = [SamplingSetting("teacher", steps) for steps in FEW_STEPS]
    return [*plain, *(SamplingSetting("teacher", steps, guidance) for steps in GUIDED_STEPS)]


def compare_with_teacher(request: TeacherComparisonRequest, console: Console) -> bool:
    """Do what the request asks for. Return whether there is a report: not where only the reference was made.

    Raises:
        UserError: an input can't be read, or does not fit.
    """
    comparison = comparison_of(request)
    if not request.make_reference:
        comparison.evaluate(console)
        return True
    reference = comparison.write_reference(request.reference, console)
    floor = frechet_distance(reference.second.features, reference.first.features)
    console.print(f"reference {request.reference}: the floor's Fréchet distance is {floor:.4g}", soft_wrap=True)
    return False


def comparison_of(request: TeacherComparisonRequest) -> TeacherComparison:
    """Load what a request names.

    Raises:
        UserError: an input can't be read, or does not fit.
    """
    device = request.model.pick_device()
    features = load_features(request.features)
    is_demo = request.model.is_demo
    foreign = features.of_demo and not is_demo and not _trains_on_demo(request)
    captions = choose_captions(
        request.prompts,
        request.data,
        () if foreign else features.network.general,
        demo=features.of_demo,
        network=features.title,
    )
    logger.info("captions: %s", captions.origin)
    if request.make_reference:
        check_overwrite(request.reference)
    preference = None if request.preference is None else load_preference(request.preference, device)
    model = request.model.load(device)
    size = request.model.resolution
    return TeacherComparison(
        model.teacher,
        features.network.to(model.teacher.device),
        captions.texts,
        request.options,
        teacher=model.weights if size is None else f"{model.weights}, {size} px",
        features=features.fingerprint,
        output=request.output,
        student=model.student,
        preference=preference,
        references=[request.reference, request.output / REFERENCE],
        about=About(
            captions.origin,
            not foreign,
            is_demo and features.of_demo,
            tuple(_notes_on(foreign, is_demo, features.title)),
        ),
    )


def _trains_on_demo(request: TeacherComparisonRequest) -> bool:
    return request.data is not None and request.data.source.startswith("demo")


def _notes_on(foreign: bool, is_demo: bool, network: str) -> list[str]:
    """Return what a reader must know of the features and the targets where the model is not the demo's."""
    notes = []
    if foreign:
        notes.append(
            f"Distances, paired distances and diversity come from {network}, which has seen only the demo’s pictures. "
            "It is not meant for photographs: trust the pictures, or give --features the weights file of FID’s "
            "Inception or the folder of a CLIP."
        )
    if not is_demo:
        notes.append("There are no targets: the project’s targets were set for the demo’s teacher.")
    return notes


class TeacherComparison(Evaluator[SamplingSetting]):
    """The student in 1, 2, 4 and 8 steps beside the teacher in many steps and in few.

    Every run is generated from ``samples``; its distribution is measured against ``independent``.

    Args:
        teacher, features: fingerprints of the weights, see :func:`~..files.fingerprint`.
        student: the student's title in the report; None evaluates the teacher alone.
        about: what the report tells of the inputs.
        preference: a model of human preference; None = no scores.
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
        preference: Preference | None = None,
        references: Sequence[Path] = (),
        about: About | None = None,
    ) -> None:
        super().__init__(output, student)
        self.about = about or About()
        self.maker = maker
        self.network = network
        self.preference = preference
        self.states = TeacherStates(maker.denoiser, maker.unconditional)
        self.random = RandomFeatures()
        self.options = options
        self.references = references
        self.many = SamplingSetting("teacher", options.steps, options.guidance, options.interval)
        self.teacher_runs = distinct([self.many, *few_step_runs(options.guidance)])
        self.student_runs = [SamplingSetting("student", steps) for steps in FEW_STEPS] if student is not None else []
        self.independent = draw(prompts, options.samples, options.seed, 0, options.times)
        # Each of the student's sets has its own noise; the first set starts from the noise of the teacher's runs.
        self.draws = [draw(prompts, options.samples, options.seed, 1 + index) for index in range(options.seeds)]
        self.samples = self.draws[0]
        known = self.about.knows_names
        self.classes = [fitting_classes(network, prompt) if known else set() for prompt in self.samples.prompts]
        self.origin = Origin(
            teacher=teacher,
            features=features,
            prompts=fingerprint_texts(prompts),
            samples=options.samples,
            times=options.times,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            interval=options.interval,
            solver=options.solver or default_solver(maker.denoiser.process),
            preference=preference.fingerprint if preference is not None else "",
        )
        self.pictures: dict[str, list[str]] = {}
        self.dimensions = self.enough = 0  # of the features, and samples that they need; known after the first picture

    def runs(self) -> list[SamplingSetting]:
        """Return the teacher's many steps, the student's runs, the undistilled teacher's runs."""
        return [self.many, *self.student_runs, *self.teacher_runs[1:]]

    def prepare(self) -> None:
        """Make the teacher's shown pictures, and find a reference that agrees with them; else make the reference."""
        self.shown = shown_rows(self.samples.prompts, self.options.pictures)
        self.bar = self._start_bar()
        self.expect(self.bar, sum(run.nfe for run in self.teacher_runs) * len(self.shown))
        self.expect(self.bar, sum(run.nfe for run in self.student_runs) * len(self.samples) * self.options.seeds)
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
        scored = self.preference is not None
        self.figures = Figures(reference, self.many.name, self.samples.prompts, self.classes, scored=scored)

    def measure(self, run: SamplingSetting) -> Record:
        """Measure a run; distances are in units of the feature network."""
        if run.role == "student":
            draws = [self.make(run, drawn, self.shown if not index else ()) for index, drawn in enumerate(self.draws)]
            made, sets = draws[0], [each.set.whitened(self.reference.whitenings) for each in draws]
        else:
            stored = self._stored(self.reference, run)
            assert stored is not None  # a reference that lacks a run was not taken
            made, sets = self.live[run], [stored]
        self.pictures[run.name] = save_pictures(made.pictures, self.output, run.name)
        return {
            "name": run.name,
            "steps": run.steps,
            "guidance": run.guidance,
            "nfe": run.nfe,
            **self.figures.of(run.name, sets),
            "seconds_per_image": made.seconds_per_image,
        }

    def targets(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Return the targets of :func:`targets_of`, where the targets apply and the samples are enough."""
        return targets_of(records, self.options.targets) if self._has_targets() else []

    def notes(self, records: Sequence[Record]) -> list[str]:
        """Return what limits the figures, the student's sampler, and the reason for each target that was left out."""
        notes = list(self.about.notes)
        if self.options.samples < self.enough:
            notes.append(too_few_samples(self.options.samples, self.enough, self.dimensions))
        if self.student is not None:
            notes += sampler_note(self.maker, FEW_STEPS)
        notes += interval_note(self.many)
        return notes

    def facts(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return floor, gaps, reference, settings, environment and pictures."""
        gaps = gaps_of(records) if self.student is not None else []
        return {
            "floor": {name: records[0][name] for name in ("fd", "kid")},
            "curve": curves_of(self.figures, {kind: kind for kind in KINDS}) if self.student is not None else [],
            "kinds": {"features": self.network.title, "states": self.states.title, "random": self.random.title},
            "preference": self.preference.title if self.preference is not None else None,
            "gaps": [{**asdict(gap), "closed": gap.closed, "times_closer": gap.times_closer} for gap in gaps],
            "reference": {
                **asdict(self.origin),
                "distinct_prompts": len(set(self.samples.prompts)),
                "stored": self.was_stored,
            },
            "inputs": {
                "captions": self.about.captions,
                "features": self.network.title,
                "dimensions": self.dimensions,
                "samples_needed": self.enough,
                "known_prompts": sum(map(bool, self.classes)),
            },
            "sampling": sampler_facts(self.maker, FEW_STEPS, self.options.solver),
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
        more: dict[str, list[Tensor]] = defaultdict(list)
        size = self.options.batch_size
        for begin in range(0, len(samples), size):
            batch = samples.rows(range(begin, min(begin + size, len(samples))))
            start = time.perf_counter()
            latents = sample_latents(self.maker, run, batch.prompts, batch.seeds, self.options.solver)
            images = decode_pictures(self.maker, latents)
            seconds += time.perf_counter() - start
            with torch.inference_mode():
                embedding, scores = self.network(images.to(self.maker.device))
                more["random"].append(self.random(images))
            more["states"].append(self.states(latents))
            more["looks"].append(torch.stack([sharpness(images), contrast(images)], 1))
            if self.preference is not None:
                more["preference"].append(self.preference(images, batch.prompts))
            features.append(embedding.float().cpu())
            named = scores.shape[1] > 0
            predicted.append(scores.argmax(1).cpu() if named else torch.full((len(batch),), UNNAMED))
            pictures += [images[row - begin] for row in shown if begin <= row < begin + size]
            self.progress.advance(self.bar, run.nfe * len(batch))
        return Measured(
            FeatureSet(
                torch.cat(features), torch.cat(predicted), {key: torch.cat(parts) for key, parts in more.items()}
            ),
            torch.stack(pictures) if pictures else torch.empty(0),
            seconds / len(samples),
        )

    def write_reference(self, path: Path, console: Console | None) -> Reference:
        """Make all of the teacher's sets and write them to ``path``."""
        with progress_bar(console) as self.progress:
            self.bar = self._start_bar()
            self._warm_up()
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
        return Reference.of(self.origin, first, second, {run.name: features for run, features in made.items()})

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

    def _has_targets(self) -> bool:
        return self.about.has_targets and self.options.samples >= self.enough

    def _warm_up(self) -> None:
        """Make one picture untimed: a first call allocates memory and loads kernels. Warn of too few samples."""
        import torch

        one = self.samples.rows([0])
        latents = sample_latents(self.maker, SamplingSetting("teacher", 1), one.prompts, one.seeds)
        with torch.inference_mode():
            embedding, _ = self.network(decode_pictures(self.maker, latents).to(self.maker.device))
        self.dimensions = embedding.shape[1]
        self.enough = samples_needed(self.dimensions, self.options.times)
        if self.options.samples < self.enough:
            logger.warning("%s", too_few_samples(self.options.samples, self.enough, self.dimensions))


def shown_rows(prompts: Sequence[str], count: int) -> list[int]:
    """Return the samples that the report shows: the first sample of each of the first ``count`` prompts, none chosen.

    Where prompts are fewer than pictures, other samples follow. At least two, since distances are measured on them.
    """
    first = [row for row, prompt in enumerate(prompts) if prompt not in prompts[:row]]
    others = [row for row in range(len(prompts)) if row not in first]
    return [*first, *others][: max(2, count)]


def too_few_samples(samples: int, enough: int, dimensions: int) -> str:
    """Return the sentence on a set that is too small for its features."""
    return (
        f"{samples} pictures a run are too few: a Fréchet distance of {dimensions} features is then mostly its own "
        f"bias, and all runs look alike. It is usable from --samples {enough} on. Below, trust the pictures, and there "
        "are no targets."
    )


def fitting_classes(network: SeesPictures, prompt: str) -> set[int]:
    """Return the classes that a prompt names, by their own name or by a general caption.

    A comma may follow the name: "small letter a, serif" names "small letter a".
    """
    names = zip(network.classes, network.general, strict=True)
    return {
        index
        for index, (name, general) in enumerate(names)
        if prompt in (name, general) or prompt.startswith(f"{name}, ")
    }
