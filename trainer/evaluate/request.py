"""An evaluation's request: the model, the runs and the files that a user has asked for, and how to load the model.

``command.py`` makes a request from the command line; everything else reads the request, never the command line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import ModelSection, TaskSection, explain
from ..demo.assets import embedded_home
from ..errors import UserError
from ..files import fingerprint

if TYPE_CHECKING:
    from ...flash_core.lora import LoraFile
    from ...flash_core.solvers import Solver
    from ..config import DataSection
    from ..tasks.base import Task
    from ..teachers.base import Teacher
    from .coco.protocols import CocoProtocol
    from .generate import SamplingSetting

logger = logging.getLogger(__name__)

TEXT_TO_IMAGE = "text-to-image"
FEW_STEPS = (1, 2, 4, 8)  # of the student, and of the undistilled teacher beside the student
GUIDED_STEPS = (1, 2, 4)  # of the undistilled teacher with guidance: 2, 4 and 8 passes
COCO_STEPS = (4, 2, 1)  # of the student, in a zero-shot evaluation
TASK_SAMPLES = 256  # default of --samples with --task: the fewest for distances of sets of the demo
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class Options:
    """Settings of a comparison with the teacher, or of a comparison on a task.

    Attributes:
        samples: pictures per run.
        times: pictures in the set that runs are measured against, per picture of a run.
        seed: of prompts and noise.
        steps: of the teacher in the reference.
        guidance: the teacher's w in ``uncond + w (cond - uncond)``.
        interval: lowest and highest uniform time, in 0..999, at which the reference is guided; None = everywhere.
        solver: the teacher's; None = the solver of its training.
        batch_size: pictures made at once; changes no picture.
        pictures: prompts that the report shows.
        seeds: sets of the student's noise, or of a task's samples; figures are means over them.
        targets: the targets of the demo's students, see ``teacher/targets.py``.
    """

    samples: int = 256
    times: int = 2
    seed: int = 0
    steps: int = 32
    guidance: float = 3.0
    interval: tuple[int, int] | None = None
    solver: Solver | None = None
    batch_size: int = 8
    pictures: int = 8
    seeds: int = 1
    targets: Literal["shipped", "make-demo"] = "shipped"


@dataclass(frozen=True)
class CocoOptions:
    """Settings of a zero-shot evaluation on COCO.

    Attributes:
        runs: the sampling settings to compare.
        seed: of the noise; each picture's own seed follows from this seed and the caption's number.
        batch_size: pictures made at once; changes no picture beyond rounding.
        precision: of the forward passes (autocast).
        pictures: captions that the report shows.
    """

    runs: tuple[SamplingSetting, ...]
    seed: int = 0
    batch_size: int = 8
    precision: Precision = "no"
    pictures: int = 8


@dataclass(frozen=True)
class ModelRequest:
    """A teacher and its student.

    Attributes:
        section: the teacher, as a recipe names one.
        fields: the fields of ``section`` beside family and path, as ``KEY=VALUE``, for the report.
        lora: the student's file or folder; None = no student.
        device: None = CUDA where there is a CUDA device, else the CPU.
        resolution: of the pictures in pixels; None = the model's own.
        stochasticity: share of fresh noise between the student's steps; None = the LoRA's metadata, else 1.
    """

    section: ModelSection
    fields: tuple[str, ...] = ()
    lora: Path | None = None
    device: str | None = None
    resolution: int | None = None
    stochasticity: float | None = None

    @property
    def is_demo(self) -> bool:
        """Whether the teacher is the embedded demo, whose pictures and names the demo's feature network knows."""
        return self.section.family == "demo" and self.section.path is None

    def pick_device(self) -> str:
        """Return the device asked for, else ``cuda`` where there is one, else ``cpu``.

        Raises:
            UserError: there is no such device here.
        """
        import torch

        if self.device is None:
            return "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(1, device=self.device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--device: {self.device} can't be used here ({reason}); expected a device of this machine, such as "
                "cpu, cuda or mps"
            ) from error
        return self.device

    def load(self, device: str, task: Task | None = None) -> LoadedModel:
        """Load the teacher and put the student's LoRA on it.

        Args:
            device: where the model goes.
            task: the task of the evaluation; None = text-to-image.

        Raises:
            UserError: the model does not read the task's conditions, or the LoRA was made for another task.
        """
        from ...flash_core.grid import MAX_FEW_STEPS
        from ...flash_core.lora import read_lora
        from ..tasks import build_task
        from ..tasks.requirements import check_channels, check_control
        from ..teachers import load_teacher

        check_control(task or build_task(TaskSection()), self.section)
        teacher = load_teacher(self.section, device, self.resolution)
        if task is not None:
            check_channels(task, teacher)
        weights = self._teacher_key(teacher)
        if self.lora is None:
            return LoadedModel(teacher, weights, None)
        lora = read_lora(self.lora)
        check_whole(lora, self.lora)
        check_lora_task(lora, self.lora, TEXT_TO_IMAGE if task is None else task.name)
        made_for = lora.metadata.teacher_hash if lora.metadata is not None else ""
        trained_for_it = task is None or (lora.metadata is not None and lora.metadata.task == task.name)
        if trained_for_it and made_for and made_for != teacher.weights_hash():
            logger.warning("%s was distilled from a teacher with other weights than %s.", self.lora, teacher.name)
        teacher.denoiser.load_adapter("student", lora.modules)
        if self.stochasticity is not None:
            teacher.stochasticity = dict.fromkeys(range(1, MAX_FEW_STEPS + 1), self.stochasticity)
        elif lora.metadata is not None:
            teacher.stochasticity = lora.metadata.stochasticity
        return LoadedModel(teacher, weights, lora.metadata.title if lora.metadata is not None else self.lora.stem)

    def _teacher_key(self, teacher: Teacher) -> str:
        """Return a hash of everything of the teacher that changes its pictures: weights and noise process, no paths."""
        import torch
        from torch import nn

        from ...flash_core.grid import trailing_timesteps
        from ..teachers.hashes import short_hash, weights_hash

        home = embedded_home(self.section.path) if self.section.family == "demo" else None
        folder = Path(str(self.section.path)) if home is None else home / "teacher"
        if folder.is_dir() and not self.fields:
            return fingerprint(folder)
        parts = {
            name: weights_hash(part)
            for name, part in sorted(teacher.pipeline.components.items())
            if isinstance(part, nn.Module)
        }
        process = teacher.denoiser.process
        timesteps = trailing_timesteps(process, 8)
        levels = process.alpha_sigma(torch.tensor(timesteps, dtype=torch.float64))
        return short_hash(parts, process.kind, process.prediction, [level.tolist() for level in levels])


@dataclass(frozen=True)
class LoadedModel:
    """A loaded teacher with its student.

    Attributes:
        weights: fingerprint of the teacher's weights.
        student: the student's title; None = no student.
    """

    teacher: Teacher
    weights: str
    student: str | None


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Fields that every request has.

    Attributes:
        output: folder for ``report.json``, ``report.html`` and ``pictures/``.
        log: ``log.jsonl`` of the student's training, for the report's curves; None = no curves.
    """

    model: ModelRequest
    output: Path
    log: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherComparisonRequest(EvaluationRequest):
    """Compare the student's few steps with the teacher's many steps.

    Attributes:
        features: the network that describes pictures, see :func:`~..metrics.embedders.load_features`.
        prompts: text file with one prompt a line; None = the run's captions, else those that the network knows.
        data: the data section of the run's recipe; None without a run.
        reference: file with the features of the teacher's sets.
        make_reference: write ``reference`` and stop.
        preference: a model of human preference, see :func:`~..metrics.pictures.preference.load_preference`; None = no
            scores.
    """

    options: Options
    features: Path
    prompts: Path | None
    data: DataSection | None
    reference: Path
    make_reference: bool
    preference: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TaskComparisonRequest(EvaluationRequest):
    """Compare student and teacher on a conditional task.

    Attributes:
        data: pictures to make conditions from: ``demo``, ``demo:STYLE``, a folder, shards, or a recipe's section.
        features: the network that describes pictures, see :func:`~..metrics.embedders.load_features`.
        vgg: VGG-16's weights for LPIPS; None = LPIPS is not measured.
        reference: file of the teacher's answers, made where it is missing; None = they are not kept.
    """

    options: Options
    task: Task
    data: str | DataSection
    features: Path
    vgg: Path | None
    reference: Path | None = None


@dataclass(frozen=True, kw_only=True)
class CocoRequest(EvaluationRequest):
    """Measure FID and CLIP score on COCO.

    Attributes:
        coco: the folder with ``annotations/`` and the pictures.
        samples: captions to draw; None = the protocol's number.
        prompts: text file with one prompt a line; None = COCO's captions.
        inception: FID's weights; None = the published file.
        clip: folder or Hub name of a CLIP; None = FID alone.
        statistics: file with the moments of COCO's pictures, made where it is missing.
    """

    options: CocoOptions
    protocol: CocoProtocol
    coco: Path
    samples: int | None
    prompts: Path | None
    inception: Path | None
    clip: str | None
    statistics: Path


def check_whole(lora: LoraFile, path: Path) -> None:
    """Check that every key of a student's LoRA belongs to a layer: a student is measured whole.

    Raises:
        UserError: names the number of such keys, and examples.
    """
    if lora.unknown:
        count = len(lora.unknown)
        raise UserError(
            f"{path}: {count} key{'s' * (count > 1)} of the file belong{'s' * (count == 1)} to no layer of a LoRA, "
            f"such as {', '.join(lora.unknown[:3])}; a part of the student would be left out. Choose a whole LoRA; "
            f"`flash-diffusion lora info {path}` lists what the file holds"
        )
    if lora.text_encoder:
        logger.warning(
            "%s: %d layers of text encoders are left out, since a student is a denoiser.", path, len(lora.text_encoder)
        )


def check_lora_task(lora: LoraFile, path: Path, task: str) -> None:
    """Check that a LoRA was distilled for the task. A text-to-image LoRA is allowed on any task, with a warning.

    Raises:
        UserError: the LoRA was distilled for another task.
    """
    if lora.metadata is None or lora.metadata.task == task:
        return
    if lora.metadata.task != TEXT_TO_IMAGE:
        raise UserError(
            f"{path} was distilled for {lora.metadata.task}, not for {task}; choose --task {lora.metadata.task}, or a "
            f"LoRA for {task}"
        )
    logger.warning("%s was distilled for text-to-image; it is measured on %s without further training.", path, task)


def model_section(family: str, path: str | None, fields: Sequence[str]) -> ModelSection:
    """Return a recipe's model section.

    Raises:
        UserError: ``--model`` names an unknown field, or a value does not fit its field.
    """
    import yaml
    from pydantic import ValidationError

    section: dict[str, Any] = {"family": family, "path": path}
    for pair in fields:
        name, found, value = pair.partition("=")
        if not found:
            raise UserError(f"--model: expected KEY=VALUE, got {pair!r}")
        try:
            section[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--model: the value of {name} is not YAML or JSON: {value!r}; expected a value, or fields such as "
                "'{path: FOLDER, scale: 0.8}'"
            ) from error
    try:
        return ModelSection.model_validate(section)
    except ValidationError as error:
        lines = explain(error, within=("model",))
        raise UserError("--model does not fit a recipe's model section:\n" + "\n".join(lines)) from error


def read_task(name: str, options: Mapping[str, Any] | None, model: ModelSection) -> Task:
    """Return the task with its options; options default to the options stored in the task adapter.

    Raises:
        UserError: an option does not fit the task, or the adapter is for another task.
    """
    from ..tasks import build_task
    from ..teachers.conditions.task_adapters import find_task_adapter

    if model.task_adapter is not None:
        adapter = find_task_adapter(model.task_adapter)
        if adapter.task != name:
            raise UserError(
                f"--task {name}: the model's task adapter, {model.task_adapter}, was made for {adapter.task}; choose "
                f"--task {adapter.task}, or an adapter for {name}"
            )
        options = adapter.options if options is None else options
    return build_task(TaskSection(name=name, options=dict(options or {})))
