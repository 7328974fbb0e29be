"""The training loop: one rollout a batch, then student, discriminator heads and critic learn from it.

accelerate owns the device, the precision and the processes. The networks are not wrapped for distribution: roles toggle
inside a step and the backward pass is split, which DistributedDataParallel's hooks would miss. What trains is small, so
its gradients are averaged across processes by hand, once an update.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast
from torch import Tensor, nn

from ...flash_core.denoiser import Conditioning
from ...flash_core.distiller import Rollout
from ..config import PhaseSection, Recipe
from ..data.order import Order
from ..data.sources import check_source
from ..data.trajectories import TrajectoryBank, record_trajectories
from ..errors import UserError
from ..export.export import export_run
from ..export.training_state import TrainingState
from ..files import partial_path
from ..seeds import stream
from ..teachers.base import weights_hash
from ..teachers.conditions.control import Control
from . import checkpoint
from .assembly import Assembly, assemble, needs_critic
from .preview import Preview, preview_rows, save_preview
from .schedule import learning_rate_factor
from .training_log import Journal, Means

logger = logging.getLogger(__name__)

RECORDING_SHARE = 0.6  # of a limited run's time after loading that trajectories take at most


class TrainingDiverged(UserError):
    """A loss or a gradient is not a number."""


def distil(recipe: Recipe, output: Path, *, resume: bool = False) -> Path:
    """Run a whole distillation.

    Args:
        output: the run's folder, made where it is missing.
        resume: continue from the last checkpoint in ``output``, or begin where there is none.

    Returns:
        The exported LoRA.

    Raises:
        UserError: the recipe does not fit, the folder holds another run, or training diverged.
    """
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        # Weights cast under no_grad must not be found in autocast's cache by a step that needs their gradients.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    check_source(recipe.data)
    found = checkpoint.checkpoints(output)
    if found and not resume:
        raise UserError(f"{output} already holds a run; continue it with --resume, or choose another --output")
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        logger.setLevel(logging.WARNING)
    lora = Run(recipe, output, accelerator, found[-1] if found else None).train()
    logger.info("the LoRA is at %s", lora)
    return lora


class Run:
    """One session of a distillation.

    Args:
        last: the checkpoint to continue from, or None.
    """

    def __init__(self, recipe: Recipe, output: Path, accelerator: Accelerator, last: Path | None) -> None:
        self.recipe = recipe
        self.output = output
        self.accelerator = accelerator
        self.session_start = time.monotonic()
        self.state, digest = checkpoint.read_facts(last) if last else (TrainingState(), recipe.digest())
        if digest != recipe.digest():
            logger.warning("the recipe has changed since %s: the result is not that of either recipe alone", last)
        self.elapsed_before = self.state.elapsed
        self.parts: Assembly = assemble(recipe, accelerator)
        examples = self.parts.examples
        logger.info("%d pictures with %d distinct captions", len(examples), len(examples.conditioning))
        self.generator = stream(recipe.seed, "training", accelerator.process_index)
        teacher = self.parts.teacher
        self.preview: Preview | None = None
        if accelerator.is_main_process:
            self.preview = Preview(recipe, preview_rows(self.parts, recipe.preview.prompts))
        self.state.teacher_hash = teacher.weights_hash()
        teacher.release_encoders()
        if last is not None:
            checkpoint.restore_shared(last, self.parts.trained)
            checkpoint.restore_random(last, accelerator.process_index, {"training": self.generator})
        self.good_checkpoint = last
        self.journal = Journal(output, self.state.update, accelerator.is_main_process)
        self.means = Means()
        self.finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self.bank: TrajectoryBank | None = None
        self.order = Order(len(self.parts.examples), recipe.seed)

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Train to the end and export."""
        if self.accelerator.is_main_process:
            (self.output / "config.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        with self.journal.progress:
            if self.recipe.trajectories.count:
                self._record_trajectories()
            if self.state.update == 0:
                self.state.training_since = self.elapsed
            self._updates()
        if self.state.update == 0:
            raise UserError(
                f"limits.max_minutes: {self.recipe.limits.max_minutes:g} minutes were over before the first update, "
                f"after {self.elapsed / 60:.1f}; nothing was learnt. Raise it, or lower trajectories.count; --resume "
                "keeps what was recorded"
            )
        self._save_checkpoint()
        self._draw_preview()
        self.journal.close()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            export_run(self.output, self.recipe, self.parts.average.tensors, self.state)
        self.accelerator.wait_for_everyone()
        return self.output / "lora.safetensors"

    def _updates(self) -> None:
        recipe, journal = self.recipe, self.journal
        task = journal.progress.add_task("distil", total=1.0, note="")
        since, logged = time.monotonic(), self.state.update
        while (progress := self.progress()) < 1:
            phase = phase_at(recipe, progress)
            factor = learning_rate_factor(recipe.optimizer, self.state.update, progress)
            self._update(phase, factor)
            update = self.state.update
            if update % recipe.log_every == 0:
                self._check_finite()
                terms = self.means.take()
                now = time.monotonic()
                images = recipe.batch_size * recipe.gradient_accumulation * self.accelerator.num_processes
                speed = (update - logged) * images / (now - since)
                since, logged = now, update
                facts = {
                    "update": update,
                    "phase": phase.name,
                    "progress": round(progress, 4),
                    "lr": float(f"{recipe.optimizer.lr * factor:.4g}"),
                    "images_per_second": round(speed, 2),
                    "seconds": round(self.elapsed, 1),
                }
                journal.record(facts, terms)
                note = f"{phase.name}  " + "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
                journal.progress.update(task, completed=progress, note=f"{note}  {speed:.1f} images/s")
                left = (self.elapsed - self.state.training_since) * (1 - progress) / max(progress, 1e-9)
                journal.say(f"update {update}, {progress:.0%}, {left / 60:.1f} min left: {note}  {speed:.1f} images/s")
            if recipe.checkpoint.every and update % recipe.checkpoint.every == 0:
                self._save_checkpoint()
            if recipe.preview.every and update % recipe.preview.every == 0:
                self._draw_preview()
        journal.progress.update(task, completed=1.0)

    def _update(self, phase: PhaseSection, factor: float) -> None:
        """One optimiser update of everything that this phase trains, from ``gradient_accumulation`` rollouts."""
        distiller, generator = self.parts.distiller, self.generator
        share = 1 / self.recipe.gradient_accumulation
        core_phase = phase.phase()
        learners = ["student"]
        if phase.adversarial > 0:
            learners.append("discriminator")
        if phase.dmd > 0 and needs_critic(self.recipe):
            learners.append("critic")
        for _ in range(self.recipe.gradient_accumulation):
            with self.accelerator.autocast():
                rollout = self._rollout(phase)
                step = distiller.student_step(rollout, core_phase, generator, share)
                terms = dict(step.terms)
                if "discriminator" in learners:
                    terms |= distiller.discriminator_step(rollout, step.z_student, generator, share)
                if "critic" in learners:
                    terms |= distiller.critic_step(rollout, step.z_student, generator, share)
            self.means.add(terms)
            self.finite &= torch.stack([value.isfinite() for value in terms.values()]).all()
        for learner in learners:
            self._apply(learner, factor)
        self.parts.average.update(self.state.update)
        self.state.update += 1

    def _apply(self, learner: str, factor: float) -> None:
        """Average, clip and apply the gradients of one of the parts that train."""
        parameters = list(self.parts.trained.parameters[learner].values())
        optimizer = self.parts.trained.optimizers[learner]
        average_gradients(parameters, self.accelerator)
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip)
        self.finite &= norm.isfinite()
        self.means.add({f"gradient_{learner}": norm})
        section = self.recipe.optimizer
        full = {"student": section.lr, "discriminator": section.discriminator_lr, "critic": section.critic_lr}[learner]
        for group in optimizer.param_groups:
            group["lr"] = full * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _rollout(self, phase: PhaseSection) -> Rollout:
        """The next batch of this process: solved by the teacher now, or replayed."""
        size = self.recipe.batch_size
        first = self.state.position + self.accelerator.process_index * size
        self.state.position += self.accelerator.num_processes * size
        index = self.order.indices(first, size)
        device, distiller = self.accelerator.device, self.parts.distiller
        if self.bank is not None:
            trajectory = self.bank.batch(index, self.parts.examples, self._unconditional, device)
            return distiller.replay(trajectory, phase.phase(), self.generator)
        z0, conditioning = self.parts.examples.batch(index, device)
        unconditional = self._unconditional(conditioning)
        return distiller.rollout(z0, conditioning, unconditional, phase.phase(), self.generator)

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:
        """What guidance compares these conditions with."""
        empty = self.parts.teacher.unconditional(len(conditioning))
        return self.parts.task.unconditional(conditioning, empty)

    def _recording_minutes(self) -> float | None:
        """How long trajectories may take: what the recipe says, and in a limited run a share of what is left of it."""
        given, limit = self.recipe.trajectories.max_minutes, self.recipe.limits.max_minutes
        if limit is None:
            return given
        left = max(0.0, limit - self.elapsed / 60) * RECORDING_SHARE
        return left if given is None else min(given, left)

    def _record_trajectories(self) -> None:
        section, journal = self.recipe.trajectories, self.journal
        task = journal.progress.add_task("teacher", total=section.count, note="trajectories")
        count = 0

        def advance(ready: int) -> None:
            nonlocal count
            count += ready
            journal.progress.advance(task, ready)
            journal.say(f"{count} of {section.count} teacher trajectories")

        with self.accelerator.autocast():
            self.bank = record_trajectories(
                self.output / "trajectories",
                section.model_copy(update={"max_minutes": self._recording_minutes()}),
                self.parts.distiller,
                self.parts.examples,
                self._unconditional,
                self.accelerator,
                self.recipe.seed,
                trajectory_fingerprint(
                    self.recipe, self.state.teacher_hash, getattr(self.parts.teacher.denoiser, "control", None)
                ),
                advance,
            )
        journal.progress.remove_task(task)
        logger.info("%d teacher trajectories after %.0f s", len(self.bank), self.elapsed)
        self.order = Order(len(self.bank), self.recipe.seed)

    # -- time --------------------------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """Seconds over all sessions."""
        return self.elapsed_before + time.monotonic() - self.session_start

    def progress(self) -> float:
        """How far training is, in 0..1: by updates, or by the clock where that is further."""
        done = self.state.update / self.recipe.updates
        minutes = self.recipe.limits.max_minutes
        if minutes is None:
            return done
        budget = max(60 * minutes - self.state.training_since, 1e-9)
        done = max(done, (self.elapsed - self.state.training_since) / budget)
        if self.accelerator.num_processes > 1:
            # One clock for all: processes that disagree about the last update would wait for each other forever.
            done = float(broadcast(torch.tensor(done, dtype=torch.float64, device=self.accelerator.device)))
        return done

    # -- what is kept ------------------------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        if bool(self.finite):
            return
        good = f"the last good checkpoint is {self.good_checkpoint}" if self.good_checkpoint else "no checkpoint yet"
        raise TrainingDiverged(
            f"a loss or gradient is not a finite number at update {self.state.update} or shortly before; {good}. "
            "Resume with a lower optimizer.lr, or without reduced precision"
        )

    def _save_checkpoint(self) -> None:
        """Everything that trains, unless it is already kept or no longer finite."""
        self._check_finite()
        final = checkpoint.checkpoint_path(self.output, self.state.update)
        if self.good_checkpoint == final:
            return
        self.state.elapsed = self.elapsed
        partial = partial_path(final)
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            checkpoint.write_shared(partial, self.parts.trained, self.state, self.recipe.digest())
        self.accelerator.wait_for_everyone()
        checkpoint.write_random(partial, self.accelerator.process_index, {"training": self.generator})
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoint.publish(partial, final, self.recipe.checkpoint.keep)
        self.good_checkpoint = final

    def _draw_preview(self) -> None:
        if self.preview is not None:
            with self.accelerator.autocast(), self.parts.average.applied():
                grid = self.preview.draw()
            save_preview(grid, self.output, self.state.update)
            self.journal.picture(grid, self.state.update)
        self.accelerator.wait_for_everyone()


def phase_at(recipe: Recipe, progress: float) -> PhaseSection:
    """The phase at a share of the run in [0, 1)."""
    left = math.floor(progress * recipe.updates + 1e-6)  # update / updates * updates may fall just below update
    for phase in recipe.phases:
        if left < phase.updates:
            return phase
        left -= phase.updates
    return recipe.phases[-1]


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean of the gradients over the processes, in one message."""
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    assert isinstance(flat, Tensor)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def trajectory_fingerprint(recipe: Recipe, teacher_hash: str, control: Control | None) -> str:
    """Everything that recorded trajectories depend on.

    An IP-Adapter's weights are the teacher's; its scale and encoder, and what reads a hint, are counted beside them.
    Where a recipe has neither, nothing stands for them: recordings of plain models stay what they were.
    """
    method, model = recipe.method, recipe.model
    beside: list[object] = []
    if model.image_adapter is not None:
        beside.append((model.image_adapter.image_encoder, model.image_adapter.scale))
    if control is not None:
        beside.append((weights_hash(control.network), control.scale))
    if not model.t5:
        beside.append("without T5")
    return repr(
        (
            teacher_hash,
            recipe.data.model_dump(mode="json"),
            recipe.task.model_dump(mode="json"),
            method.teacher_steps,
            method.solver,
            method.guidance,
            recipe.trajectories.count,
            recipe.trajectories.batch,
            recipe.seed,
            recipe.precision,
            *beside,
        )
    )
