"""One optimiser update: student, discriminator heads and critic learn from the same rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config import PhaseSection, Recipe
from ..data.batches.rollouts import Rollouts
from ..export.training_state import TrainingState
from .assembly import Assembly, needs_critic
from .training_log import Means


class Updater:
    """Makes a run's updates, and keeps the means of their terms on the device.

    Attributes:
        means: of losses and gradient norms since the last line of the log.
        finite: () bool, False once a loss or a gradient was infinite or NaN.
    """

    def __init__(self, recipe: Recipe, parts: Assembly, rollouts: Rollouts, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.parts = parts
        self.rollouts = rollouts
        self.accelerator = accelerator
        self.means = Means()
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        section = recipe.optimizer
        self.learning_rates = {
            "student": section.lr,
            "discriminator": section.discriminator_lr,
            "critic": section.critic_lr,
        }

    def update(self, state: TrainingState, phase: PhaseSection, factor: float) -> None:
        """Make one update of everything that ``phase`` trains, from ``gradient_accumulation`` rollouts.

        Args:
            state: moves on by one update and by the samples of all processes.
            factor: share of the full learning rates.
        """
        learners = self._learners(phase)
        for _ in range(self.recipe.gradient_accumulation):
            self._accumulate(state.position, phase, learners)
            state.position += self.accelerator.num_processes * self.recipe.batch_size
        for learner in learners:
            self._step(learner, factor)
        self.parts.average.update(state.update)
        state.update += 1

    def _learners(self, phase: PhaseSection) -> list[str]:
        learners = ["student"]
        if phase.adversarial > 0:
            learners.append("discriminator")
        if phase.dmd > 0 and needs_critic(self.recipe):
            learners.append("critic")
        return learners

    def _accumulate(self, position: int, phase: PhaseSection, learners: Sequence[str]) -> None:
        """Add the gradients of one batch."""
        distiller, generator = self.parts.distiller, self.rollouts.generator
        share = 1 / self.recipe.gradient_accumulation
        core_phase = phase.phase()
        with self.accelerator.autocast():
            rollout = self.rollouts.batch(position, core_phase)
            step = distiller.student_step(rollout, core_phase, generator, share)
            terms = dict(step.terms)
            if "discriminator" in learners:
                terms |= distiller.discriminator_step(rollout, step.z_student, generator, share)
            if "critic" in learners:
                terms |= distiller.critic_step(rollout, step.z_student, generator, share)
        self.means.add(terms)
        self.finite &= torch.stack([value.isfinite() for value in terms.values()]).all()

    def _step(self, learner: str, factor: float) -> None:
        """Average a learner's gradients over the processes, clip them and step its optimiser."""
        parameters = list(self.parts.trained.parameters[learner].values())
        optimizer = self.parts.trained.optimizers[learner]
        average_gradients(parameters, self.accelerator)
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip)
        self.finite &= norm.isfinite()
        self.means.add({f"gradient_{learner}": norm})
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rates[learner] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients by their mean over the processes, in one message."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    assert isinstance(flat, Tensor)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
