"""How close a student's few steps come to its teacher's many, in numbers and in pictures; no data set is needed.

Decides what is run and writes `report.json` and the pictures. `reference.py` says what reference and floor are,
`metrics.py` has the numbers, `generate.py` makes the pictures, `measure.py` looks at them and keeps the time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import fingerprint_texts
from ..metrics.distances import diversity, frechet_distance, kernel_distance, paired_distance, prompt_accuracy
from .generate import PictureMaker, SamplingSetting, default_solver
from .measure import FEW_STEPS, Evaluation, FeatureNetwork, Measured, Options, environment, progress_bar
from .reference import Origin, Reference

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

logger = logging.getLogger(__name__)

REFERENCE = "reference.safetensors"
# The project's own targets, for its demo: the student's distance as a multiple of the floor, at most; and how many
# times closer to the teacher it is than the undistilled teacher with as many passes and no guidance, at least.
FLOOR_LIMITS = {4: 1.5, 2: 3.0, 1: 6.0}
CLOSER_LIMIT = 5.0


def evaluate(
    generator: PictureMaker,
    network: FeatureNetwork,
    prompts: Sequence[str],
    options: Options,
    *,
    teacher: str,
    features: str,
    output: Path,
    student: str | None = None,
    references: Sequence[Path] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Run everything, write ``report.json`` and ``pictures/`` into ``output``, and return the report.

    Args:
        teacher, features: fingerprints of the weights, see :func:`~..files.fingerprint`.
        student: what the student is called in the report; None evaluates the teacher alone.
        references: reference files to try in turn. Where none fits, all of the teacher's sets are made anew (which
            costs many times the student's) and kept in ``output``, with a message that says why.
        console: where the progress bar is drawn; None draws none.
    """
    with progress_bar(console) as progress:
        evaluation = Evaluation(generator, network, prompts, options, progress)
        many, samples, shown = evaluation.many, evaluation.samples, evaluation.shown()
        student_runs = [SamplingSetting("student", steps) for steps in FEW_STEPS] if student is not None else []
        evaluation.expect(sum(run.nfe for run in evaluation.teacher_runs) * len(shown))
        evaluation.expect(sum(run.nfe for run in student_runs) * len(samples))
        evaluation.warm_up()
        live = {run: evaluation.measure(run, samples.rows(shown), range(len(shown))) for run in evaluation.teacher_runs}
        origin = origin_of(generator, prompts, options, teacher, features)
        reference = find_reference(references, origin)
        if reference is not None and (problem := evaluation.not_reproduced(reference, live, shown)):
            logger.warning("The reference does not hold here: %s. It is made anew.", problem)
            reference = None
        was_stored = reference is not None
        if reference is None:
            reference = evaluation.make_reference(origin)
            reference.save(output / REFERENCE)
        made = {run: replace(seen, set=evaluation.stored(reference, run)) for run, seen in live.items()}
        results = {many: made.pop(many)}
        results |= {run: evaluation.measure(run, samples, shown) for run in student_runs}
        results |= made

    classes = [fitting_classes(network, prompt) for prompt in samples.prompts]
    records = [record(run, result, reference, samples.prompts, classes) for run, result in results.items()]
    floor = {name: records[0][name] for name in ("fd", "kid")}
    report = {
        "floor": floor,
        "runs": records,
        "targets": targets(records, floor["fd"]) if student is not None else [],
        "student": student,
        "reference": {**asdict(origin), "distinct_prompts": len(set(samples.prompts)), "stored": was_stored},
        "settings": asdict(options),
        "environment": environment(generator.device),
        "pictures": {
            "prompts": [samples.prompts[row] for row in shown],
            "files": {run.name: save_pictures(result.pictures, output, run.name) for run, result in results.items()},
        },
    }
    (output / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def origin_of(generator: PictureMaker, prompts: Sequence[str], options: Options, teacher: str, features: str) -> Origin:
    """What a reference for this evaluation is made of."""
    return Origin(
        teacher=teacher,
        features=features,
        prompts=fingerprint_texts(prompts),
        samples=options.samples,
        times=options.times,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        solver=options.solver or default_solver(generator.denoiser.process),
    )


def find_reference(paths: Sequence[Path], wanted: Origin) -> Reference | None:
    """The first stored reference that serves; says of each other why it doesn't."""
    for path in paths:
        if not path.is_file():
            logger.info("There is no reference at %s.", path)
            continue
        reference = Reference.load(path)
        if (mismatch := reference.mismatch(wanted)) is None:
            return reference.head(wanted.samples)
        logger.warning("The reference %s is of something else: %s.", path, mismatch)
    return None


def fitting_classes(network: FeatureNetwork, prompt: str) -> set[int]:
    """The classes that a prompt names, by their own name or by a general caption."""
    names = zip(network.classes, network.general, strict=True)
    return {index for index, (name, general) in enumerate(names) if prompt in (name, general)}


def record(
    run: SamplingSetting,
    result: Measured,
    reference: Reference,
    prompts: Sequence[str],
    classes: Sequence[Collection[int]],
) -> dict[str, Any]:
    """A run's line in the report; distances are in units of the feature network."""
    features = result.set.features
    return {
        "name": run.name,
        "steps": run.steps,
        "guidance": run.guidance,
        "nfe": run.nfe,
        "fd": frechet_distance(features, reference.first.features),
        "kid": kernel_distance(features, reference.first.features),
        "paired": paired_distance(features, reference.second.features),
        "prompt_accuracy": prompt_accuracy(result.set.predicted, classes),
        "diversity": diversity(features, prompts),
        "seconds_per_image": result.seconds_per_image,
    }


def targets(records: Sequence[dict[str, Any]], floor: float) -> list[dict[str, Any]]:
    """The project's targets: what was asked, what came out, and whether that meets it.

    ``perfect`` is what a student that draws exactly as its teacher would score, where that may be short of the target.

    Args:
        floor: Fréchet distance of two independent sets of the teacher's own, above 0.
    """
    fd = {line["name"]: line["fd"] for line in records}
    found = []
    for steps, limit in FLOOR_LIMITS.items():
        student = SamplingSetting("student", steps).name
        value = fd[student] / floor
        found.append(
            {"run": student, "measure": "times the floor", "value": value, "at_most": limit, "met": value <= limit}
        )
    for steps in FLOOR_LIMITS:
        student, rival = SamplingSetting("student", steps).name, SamplingSetting("teacher", steps).name
        value = fd[rival] / fd[student]
        found.append(
            {
                "run": student,
                "measure": f"times closer than {rival} without guidance",
                "value": value,
                "at_least": CLOSER_LIMIT,
                "perfect": fd[rival] / floor,
                "met": value >= CLOSER_LIMIT,
            }
        )
    return found


def save_pictures(pictures: Tensor, output: Path, name: str) -> list[str]:
    """Write a run's pictures (K, 3, H, W) in [0, 1] as lossless WebP; returns their paths inside ``output``."""
    from PIL import Image

    folder = Path("pictures") / name.replace(",", "").replace(" ", "-")
    (output / folder).mkdir(parents=True, exist_ok=True)
    names = []
    for index, picture in enumerate(pictures):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        names.append((folder / f"{index:02}.webp").as_posix())
        Image.fromarray(pixels).save(output / names[-1], lossless=True)
    return names
