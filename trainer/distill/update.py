"""One optimiser update: student, discriminator heads and critic learn from the same rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning
from ...flash_core.passes.asking import asked_by
from ...flash_core.rollout import Rollout
from ...flash_core.terms.adversarial import Seen
from ...flash_core.terms.draws import acts_on
from ...flash_core.terms.shared_batch import Random
from ..config import PhaseSection, Recipe
from ..data.batches.memory import OutputMemory
from ..data.batches.rollouts import Rollouts
from ..export.training_state import TrainingState
from .assembly import Assembly, needs_critic
from .training_log import Means


@dataclass(frozen=True)
class Batch:
    """A rollout with the student's outputs (B, C, H, W), detached, and what its adversarial loss has seen.

    Attributes:
        draws: the samples as part of the batch that processes share.
        shares: of each process, the positions of its samples in that batch.
    """

    rollout: Rollout
    z_student: Tensor
    draws: Random
    shares: Sequence[Sequence[int]]
    seen: Seen | None = None


class Updater:
    """Makes a run's updates, and keeps the means of their terms on the device.

    Attributes:
        means: of losses and gradient norms since the last line of the log.
        memory: of the student's last outputs, for the critic.
        finite: () bool, False once a loss or a gradient was infinite or NaN.
    """

    def __init__(self, recipe: Recipe, parts: Assembly, rollouts: Rollouts, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.parts = parts
        self.rollouts = rollouts
        self.accelerator = accelerator
        self.means = Means()
        self.memory = OutputMemory(recipe.method.critic.memory)
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        section, method = recipe.optimizer, recipe.method
        self.learning_rates = {
            "student": section.lr,
            "discriminator": section.discriminator_lr,
            "critic": section.critic_lr,
        }
        self.updates = {"discriminator": method.discriminator.updates, "critic": method.critic.updates}
        self.warmup = {"discriminator": method.discriminator.warmup, "critic": method.critic.warmup}

    def update(self, state: TrainingState, phase: PhaseSection, factor: float) -> None:
        """Make one update of everything that ``phase`` trains, from ``gradient_accumulation`` rollouts.

        Args:
            state: moves on by one update and by the samples of all processes.
            factor: share of the full learning rates; the phase's own factor comes on top of the student's.
        """
        core_phase = phase.phase()
        batches = []
        for rollout in self._rollouts(state, phase):
            with self.accelerator.autocast():
                step = self.parts.distiller.student_step(rollout, core_phase, self.rollouts.draws, self._share)
            self._note(step.terms)
            self.means.add(step.figures)
            batches.append(Batch(rollout, step.z_student, self.rollouts.draws, self.rollouts.shares, step.seen))
        self._step("student", factor * phase.learning_rate)
        learners = self._learners(phase)
        if "critic" in learners:
            self._align_critic()
            self._remember(batches)
        for learner in learners:
            for number in range(self.updates[learner]):
                self._teach(learner, batches, factor, again=number > 0)
        self.parts.average.update(state.update)
        self.parts.counted.images += self.recipe.batch_size * len(batches)
        state.update += 1

    def warm_up(self, state: TrainingState, phase: PhaseSection) -> Iterator[tuple[int, int]]:
        """Update heads and critic alone, at their full learning rates, as often as the recipe wants before ``phase``.

        Yields:
            After each update: how many are made, and how many there are.
        """
        waiting = {name: self.warmup[name] for name in self._learners(phase)}
        while learners := [name for name, count in waiting.items() if state.warmed_up.get(name, 0) < count]:
            batches = [
                Batch(rollout, self._output(rollout), self.rollouts.draws, self.rollouts.shares)
                for rollout in self._rollouts(state, phase)
            ]
            if "critic" in learners:
                self._remember(batches)
            for learner in learners:
                self._teach(learner, batches, 1.0)
                state.warmed_up[learner] = state.warmed_up.get(learner, 0) + 1
            yield max(state.warmed_up[learner] for learner in learners), max(waiting.values())

    def share_means(self) -> None:
        """Let every process have the means of all processes; all must call this together."""
        if self.accelerator.num_processes > 1:
            self.means.share(lambda sums: self.accelerator.reduce(sums, "mean"))

    def own_state(self) -> dict[str, Tensor]:
        """Return what a process keeps for a checkpoint: the critic's memory, the log's sums and counts.

        All but the counts of passes is the same in all processes, which must call this together.
        """
        self.share_means()
        means = {f"means/{name}": value for name, value in self.means.state().items()}
        memory = {f"memory/{name}": value for name, value in self.memory.state().items()}
        counted = self.parts.counted
        passes = {
            f"passes/{kind}/{term}": torch.tensor(count)
            for kind, counts in (("all", counted.counts), ("unconditional", counted.unconditional))
            for term, count in counts.items()
        }
        passes["passes/images/"] = torch.tensor(counted.images)
        return means | memory | passes

    def restore_own(self, state: Mapping[str, Tensor]) -> None:
        """Set what :meth:`own_state` returned."""
        parts: dict[str, dict[str, Tensor]] = {"means": {}, "memory": {}, "passes": {}}
        for name, value in state.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        self.means.restore(parts["means"], self.accelerator.device)
        self.memory.restore(parts["memory"], self.accelerator.device)
        counted = self.parts.counted
        counted.images = int(parts["passes"].pop("images/", 0))
        for name, count in parts["passes"].items():
            kind, _, term = name.partition("/")
            counts = counted.counts if kind == "all" else counted.unconditional
            counts[term] = int(count)

    @property
    def _share(self) -> float:
        """The weight of one batch in an update's gradient."""
        return 1 / self.recipe.gradient_accumulation

    def _learners(self, phase: PhaseSection) -> list[str]:
        """Return the parts that ``phase`` trains beside the student."""
        learners = ["discriminator"] if phase.adversarial > 0 else []
        return learners + (["critic"] if phase.dmd > 0 and needs_critic(self.recipe) else [])

    def _rollouts(self, state: TrainingState, phase: PhaseSection) -> Iterator[Rollout]:
        """Yield the rollouts of one update; ``state.position`` moves on."""
        for _ in range(self.recipe.gradient_accumulation):
            with self.accelerator.autocast():
                rollout = self.rollouts.batch(state.position, phase)
            state.position += self.accelerator.num_processes * self.recipe.batch_size
            yield rollout

    @torch.no_grad()
    def _output(self, rollout: Rollout) -> Tensor:
        """Return the student's outputs without a gradient."""
        distiller = self.parts.distiller
        with self.accelerator.autocast(), asked_by("student"), distiller.denoiser.role("student"):
            return distiller.student_output(rollout)

    def _teach(self, learner: str, batches: Sequence[Batch], factor: float, again: bool = False) -> None:
        """Make one update of the discriminator's heads or of the critic.

        Args:
            again: True after the first update on these batches: the heads then see them with other noise.
        """
        distiller = self.parts.distiller
        with self.accelerator.autocast():
            if learner == "discriminator":
                for batch in batches:
                    seen = None if again else batch.seen
                    self._note(
                        distiller.discriminator_step(batch.rollout, batch.z_student, batch.draws, self._share, seen)
                    )
            else:
                for z, conditioning, rollout, of in self._critic_samples(batches):
                    self._note(distiller.critic_step(z, conditioning, of, self._share, rollout))
        self._step(learner, factor)

    def _critic_samples(
        self, batches: Sequence[Batch]
    ) -> Iterator[tuple[Tensor, Conditioning, Rollout | None, Random]]:
        """Yield the critic's batches: drawn from the memory where there is one, else the student's present outputs."""
        for batch in batches:
            if not self.memory.capacity:
                z, rollout, of = self.parts.distiller.critic_samples(batch.rollout, batch.z_student, batch.draws)
                if len(z):
                    yield z, rollout.conditioning, rollout, of
            elif len(self.memory):
                yield *self.memory.draw(self.recipe.batch_size, batch.draws), None, batch.draws

    def _remember(self, batches: Sequence[Batch]) -> None:
        """Add the outputs that the critic learns from to the memory, which holds those of all processes."""
        for batch in batches if self.memory.capacity else ():
            every = self._gathered(batch.z_student, batch.shares)
            conditioning = batch.rollout.conditioning.map(partial(self._gathered, shares=batch.shares))
            rows = self.parts.distiller.settings.dmd.rows
            acting = acts_on(rows, self.parts.distiller.denoiser.process, batch.rollout.all_starts())
            index = torch.tensor([row for row, acts in enumerate(acting) if acts], dtype=torch.long)
            self.memory.add(every[index.to(every.device)], conditioning.rows(index))

    def _gathered(self, own: Tensor, shares: Sequence[Sequence[int]]) -> Tensor:
        """Return the rows (N, ...) of all processes in the order of the batch, from this process's ``own`` (B, ...)."""
        if len(shares) == 1:
            return own
        every: Tensor = self.accelerator.gather(own.contiguous())
        positions = torch.tensor([position for share in shares for position in share], device=every.device)
        return every[positions.argsort()]

    def _align_critic(self) -> None:
        """Move the critic's LoRA toward the student's: critic <- lerp(critic, student, ida) (arXiv 2506.00523)."""
        if share := self.recipe.method.critic.ida:
            parts = self.parts.trained.parameters
            with torch.no_grad():
                torch._foreach_lerp_(list(parts["critic"].values()), list(parts["student"].values()), share)

    def _note(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of a step to the means, and watch that they are finite."""
        if terms:
            self.means.add(terms)
            self.finite &= torch.stack([value.isfinite() for value in terms.values()]).all()

    def _step(self, learner: str, factor: float) -> None:
        """Average a learner's gradients over the processes, clip them and step its optimiser."""
        parameters = list(self.parts.trained.parameters[learner].values())
        optimizer = self.parts.trained.optimizers[learner]
        average_gradients(parameters, self.accelerator)
        if all(parameter.grad is None for parameter in parameters):
            return  # no sample of this update was one that the term acts on
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip)
        self.finite &= norm.isfinite()
        self.means.add({f"gradient_{learner}": norm})
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rates[learner] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients by their mean over the processes, in one message.

    All processes have gradients or none has, see :class:`~...flash_core.terms.shared_batch.SharedBatch`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if accelerator.num_processes == 1 or not gradients:
        return
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    assert isinstance(flat, Tensor)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
