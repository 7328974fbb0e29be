"""A run's rollouts, batch by batch: solved by the teacher now, or replayed from recorded trajectories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ...flash_core.denoiser import Conditioning
from ...flash_core.distiller import Distiller, Phase, Rollout
from ..config import Recipe
from ..interrupts import StopRequest
from ..seeds import stream
from .encode import Examples
from .order import Order
from .trajectories import TrajectoryBank, record_trajectories, trajectory_fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..tasks.base import Task
    from ..teachers.base import Teacher


class Rollouts:
    """Draws the batches of one process in the order of the seed.

    Args:
        distiller: solves or replays.
        examples: encoded pictures with their conditions.

    Attributes:
        generator: the process's random stream, which the training steps share; a checkpoint keeps its state.
        length: examples of an epoch, or recorded trajectories.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        task: Task,
        examples: Examples,
        distiller: Distiller,
        accelerator: Accelerator,
    ) -> None:
        self.recipe = recipe
        self.teacher = teacher
        self.task = task
        self.examples = examples
        self.distiller = distiller
        self.accelerator = accelerator
        self.generator = stream(recipe.seed, "training", accelerator.process_index)
        self.bank: TrajectoryBank | None = None
        self.order = Order(len(examples), recipe.seed)

    def record(
        self,
        folder: Path,
        teacher_hash: str,
        max_minutes: float | None,
        advance: Callable[[int, float | None], None],
        stop: StopRequest,
    ) -> int:
        """Record the recipe's trajectories in ``folder``, or read them; batches replay them from now on.

        Args:
            teacher_hash: of the base's weights before training changed its layers.
            max_minutes: the recording ends early after so many minutes.
            advance, stop: see :func:`record_trajectories`.

        Returns:
            The number of trajectories.
        """
        control = getattr(self.teacher.denoiser, "control", None)
        self.bank = record_trajectories(
            folder,
            self.recipe.trajectories.model_copy(update={"max_minutes": max_minutes}),
            self.distiller,
            self.examples,
            self._unconditional,
            self.accelerator,
            self.recipe.seed,
            trajectory_fingerprint(self.recipe, teacher_hash, control),
            advance,
            stop,
        )
        self.order = Order(len(self.bank), self.recipe.seed)
        return len(self.bank)

    def batch(self, position: int, phase: Phase) -> Rollout:
        """Return this process's rollout of the batch at ``position``, in samples of all processes together."""
        size = self.recipe.batch_size
        index = self.order.indices(position + self.accelerator.process_index * size, size)
        device = self.accelerator.device
        if self.bank is not None:
            trajectory = self.bank.batch(index, self.examples, self._unconditional, device)
            return self.distiller.replay(trajectory, phase, self.generator)
        z0, conditioning = self.examples.batch(index, device)
        return self.distiller.rollout(z0, conditioning, self._unconditional(conditioning), phase, self.generator)

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:
        """Return the conditions of guidance's unconditional branch."""
        return self.task.unconditional(conditioning, self.teacher.unconditional(len(conditioning)))
