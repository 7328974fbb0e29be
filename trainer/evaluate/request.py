"""An evaluation's request: the model, the runs and the files that a user has asked for, and how to load the model.

``command.py`` makes a request from the command line; everything else reads the request, never the command line.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..demo.assets import TEACHER as DEMO_TEACHER
from ..errors import UserError
from ..files import fingerprint

if TYPE_CHECKING:
    from ...flash_core.lora import LoraFile
    from ...flash_core.solvers import Solver
    from ..config import DataSection, ModelSection
    from ..tasks.base import Task
    from ..teachers.base import Teacher
    from .coco.protocols import CocoProtocol
    from .generate import SamplingSetting

logger = logging.getLogger(__name__)

TEXT_TO_IMAGE = "text-to-image"
FEW_STEPS = (4, 2, 1)  # of the student, and of the undistilled teacher beside the student
TASK_SAMPLES = 96  # default of --samples with --task: 9,000 passes, 2 to 3 minutes of the demo on one core
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
        solver: the teacher's; None = the solver of its training.
        batch_size: pictures made at once; changes no picture.
        pictures: prompts that the report shows.
    """

    samples: int = 256
    times: int = 2
    seed: int = 0
    steps: int = 32
    guidance: float = 3.0
    solver: Solver | None = None
    batch_size: int = 8
    pictures: int = 8


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

    def pick_device(self) -> str:
        """Return the device asked for, else ``cuda`` where there is one, else ``cpu``."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

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
        from ..config import TaskSection
        from ..tasks import build_task
        from ..tasks.requirements import check_channels, check_control
        from ..teachers import load_teacher

        check_control(task or build_task(TaskSection()), self.section)
        teacher = load_teacher(self.section, device, self.resolution)
        folder = Path(self.section.path) if self.section.path else DEMO_TEACHER
        if task is not None:
            check_channels(task, teacher)
        weights = fingerprint(folder) if folder.is_dir() and not self.fields else teacher.weights_hash()
        if self.lora is None:
            return LoadedModel(teacher, weights, None)
        lora = read_lora(self.lora)
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
        features: folder of the feature network.
        prompts: text file with one prompt a line; None = the feature network's general captions.
        reference: file with the features of the teacher's sets.
        make_reference: write ``reference`` and stop.
    """

    options: Options
    features: Path
    prompts: Path | None
    reference: Path
    make_reference: bool


@dataclass(frozen=True, kw_only=True)
class TaskComparisonRequest(EvaluationRequest):
    """Compare student and teacher on a conditional task.

    Attributes:
        data: pictures to make conditions from: ``demo``, ``demo:STYLE``, a folder, shards, or a recipe's section.
        features: folder of the feature network.
        vgg: VGG-16's weights for LPIPS; None = LPIPS is not measured.
    """

    options: Options
    task: Task
    data: str | DataSection
    features: Path
    vgg: Path | None


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


def read_prompts(path: Path) -> list[str]:
    """Read the lines of a text file, without the empty ones.

    Raises:
        UserError: the file holds no prompts.
    """
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts: {path} holds no prompts; expected one prompt a line")
    return prompts
