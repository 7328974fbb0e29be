"""The samples of a rehearsal: conditions from the teacher's own encoders, and batches that start where it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ...flash_core.distiller import Distiller, Phase, Rollout, Trajectory
from ...flash_core.terms.shared_batch import Random
from ..config import PhaseSection, Recipe
from ..tasks.base import Task
from ..teachers.base import Teacher, full_precision
from ..teachers.in_memory.stages import PICTURES
from .meter import Meter
from .pretend.fakes import PretendAccelerator
from .pretend.teacher import pictures

CAPTION = "a picture"


class PretendExamples:
    """As many equal samples as a batch asks for.

    Attributes:
        encoded: (1) the conditions of one sample, as the teacher and the task encode them.
    """

    fingerprint = "a rehearsal"

    def __init__(self, teacher: Teacher, task: Task) -> None:
        self.teacher = teacher
        self.own = conditions_of(task, teacher, pictures(teacher, 1))
        self.encoded = teacher.encode_prompts([CAPTION]).joined(self.own)

    def batch(
        self, index: Tensor, device: torch.device | str, caption: Tensor | None = None
    ) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and conditions of ``len(index)`` samples, each in memory of its own."""
        count = len(index)
        z0 = torch.randn(count, *self.teacher.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
        return z0, repeated(self.encoded, count)

    def task_conditions(self, index: Tensor, device: torch.device | str) -> Conditioning:
        """Return the task's conditions of ``len(index)`` samples."""
        return repeated(self.own, len(index))

    def first_samples(self, count: int) -> list[tuple[str, int]]:
        """Return captions and indices."""
        return [(CAPTION, index) for index in range(count)]


@torch.no_grad()
def conditions_of(task: Task, teacher: Teacher, shown: Tensor) -> Conditioning:
    """Return the task's conditions of pictures on the CPU, where they are drawn: edges and masks need real values."""
    teacher.stages.enter(PICTURES)
    with full_precision(teacher.device):
        drawn = task.draw(shown, {}, torch.Generator().manual_seed(0))
        return task.encode({name: value.to(teacher.device) for name, value in drawn.items()}, teacher)


def repeated(conditioning: Conditioning, count: int) -> Conditioning:
    """Return one sample's conditions ``count`` times."""
    return conditioning.map(lambda value: value.repeat(count, *(1 for _ in value.shape[1:])))


class PretendRollouts:
    """Batches of the pretended samples, solved or replayed as a run's are.

    Attributes:
        generator, draws: the run's random stream, on the CPU and with real values.
        shares: of the one process, the positions of its samples in a batch: all.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        task: Task,
        examples: PretendExamples,
        distiller: Distiller,
        accelerator: PretendAccelerator,
    ) -> None:
        self.recipe = recipe
        self.teacher = teacher
        self.task = task
        self.examples = examples
        self.distiller = distiller
        self.accelerator = accelerator
        self.generator = self.draws = torch.Generator().manual_seed(recipe.seed)
        self.shares = [tuple(range(recipe.batch_size))]

    def batch(self, position: int, section: PhaseSection) -> Rollout:
        """Return the rollout of a batch; ``position`` is not read, since all samples are equal."""
        phase = section.phase()
        z0, conditioning = self.inputs(self.recipe.batch_size)
        unconditional = self.unconditional(conditioning)
        if not self.recipe.trajectories.count:
            return self.distiller.rollout(z0, conditioning, unconditional, phase, self.generator)
        indices = self.distiller.recorded_indices()
        states = torch.stack([z0 for _ in indices])
        guidance = torch.full((len(z0),), sum(self.recipe.method.guidance) / 2, device=z0.device)
        trajectory = Trajectory(indices, states, z0, z0, guidance, conditioning, unconditional)
        return self.distiller.replay(trajectory, phase, self.generator)

    def record(self) -> None:
        """Let the teacher solve one batch of trajectories, as a run does before its updates."""
        z0, conditioning = self.inputs(self.recipe.trajectories.batch)
        self.distiller.trajectory(z0, conditioning, self.unconditional(conditioning), self.generator)

    def inputs(self, count: int) -> tuple[Tensor, Conditioning]:
        """Return latents and conditions of ``count`` samples."""
        return self.examples.batch(torch.arange(count), self.accelerator.device)

    def unconditional(self, conditioning: Conditioning) -> Conditioning:
        """Return the conditions of guidance's unconditional branch."""
        empty = self.teacher.unconditional(len(conditioning))
        return self.task.unconditional(conditioning, replace(empty, size_ids=conditioning.size_ids))


def _metered(name: str, moment: str) -> Any:
    """Return the distiller's method of that name, counted under ``moment``."""
    method = getattr(Distiller, name)

    @wraps(method)
    def counted(self: RehearsedDistiller, *args: Any, **kwargs: Any) -> Any:
        with self.meter.moment(moment):
            return method(self, *args, **kwargs)

    return counted


class RehearsedDistiller(Distiller):
    """The run's distiller: its starts are set, and its steps are counted by name.

    Attributes:
        start: the index of the teacher's grid at which every sample starts.
        meter: counts.
    """

    start = 0
    meter: Meter

    def draw_indices(self, phase: Phase, allowed: Sequence[int], batch: int, generator: Random) -> list[int]:
        """Return the start that was set for every sample, or the nearest one that is allowed."""
        return [min(allowed, key=lambda index: abs(index - self.start))] * batch

    rollout = _metered("rollout", "rollout")
    replay = _metered("replay", "rollout")
    trajectory = _metered("trajectory", "recording")
    student_step = _metered("student_step", "student")
    discriminator_step = _metered("discriminator_step", "discriminator")
    critic_step = _metered("critic_step", "critic")
