"""The training loop: record trajectories or not, then update phase by phase, with checkpoints and previews between.

accelerate owns the device, the precision and the processes. The networks are not wrapped in DistributedDataParallel:
its hooks would miss roles that change inside a step and a backward pass that is split. The weights that train are few,
so their gradients are averaged across processes once an update (``update.py``).
"""

from __future__ import annotations

import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import AutocastKwargs

from ..config import PhaseSection, Recipe
from ..data.rollouts import Rollouts
from ..data.sources import check_source
from ..data.trajectories import own_batches
from ..errors import UserError
from ..export.export import export_run
from ..export.training_state import TrainingState
from . import checkpoint
from .assembly import Assembly, assemble
from .preview import Preview, preview_rows, save_preview
from .schedule import RunClock, learning_rate_factor, now, phase_at
from .time_left import TimeLeft, phase_stages, recording_stage
from .training_log import TrainingLog
from .update import Updater

logger = logging.getLogger(__name__)


class TrainingDiverged(UserError):
    """A loss or a gradient is infinite or NaN."""


def distil(recipe: Recipe, output: Path, *, resume: bool = False) -> Path:
    """Run a whole distillation and return the path of the exported LoRA.

    Args:
        recipe: all settings.
        output: the run's folder; it is made where it is missing.
        resume: continue from the last checkpoint in ``output``, or begin where there is none.

    Raises:
        UserError: the recipe does not fit the model or the data, the folder holds another run, or training diverged.
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
        self.state, digest = checkpoint.read_facts(last) if last else (TrainingState(), recipe.digest())
        if digest != recipe.digest():
            logger.warning("the recipe has changed since %s: the result belongs to neither recipe", last)
        self.clock = RunClock(recipe, self.state, accelerator)
        self.parts: Assembly = assemble(recipe, accelerator)
        teacher, examples = self.parts.teacher, self.parts.examples
        logger.info("%d pictures with %d distinct captions", len(examples), len(examples.conditioning))
        self.rollouts = Rollouts(recipe, teacher, self.parts.task, examples, self.parts.distiller, accelerator)
        self.updater = Updater(recipe, self.parts, self.rollouts, accelerator)
        self.preview: Preview | None = None
        if accelerator.is_main_process:
            self.preview = Preview(recipe, preview_rows(self.parts, recipe.preview.prompts))
        self.state.teacher_hash = teacher.weights_hash()
        teacher.release_encoders()
        if last is not None:
            checkpoint.restore_shared(last, self.parts.trained)
            checkpoint.restore_random(last, accelerator.process_index, {"training": self.rollouts.generator})
        self.good_checkpoint = last
        self.log = TrainingLog(output, self.state.update, accelerator.is_main_process)
        self.time_left = TimeLeft(phase_stages(recipe, self.state.update))

    def train(self) -> Path:
        """Train to the end, export, and return the path of the LoRA."""
        if self.accelerator.is_main_process:
            (self.output / "config.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        with self.log.progress:
            if self.recipe.trajectories.count:
                self._record_trajectories()
            if self.state.update == 0:
                self.state.training_since = self.clock.elapsed
            self._make_updates()
        if self.state.update == 0:
            raise UserError(
                f"limits.max_minutes: {self.recipe.limits.max_minutes:g} minutes were over before the first update, "
                f"after {self.clock.elapsed / 60:.1f}; nothing was learnt. Raise it, or lower trajectories.count; "
                "--resume keeps the recorded trajectories"
            )
        self._save_checkpoint()
        self._draw_preview()
        self.log.close()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            export_run(self.output, self.recipe, self.parts.average.tensors, self.state)
        self.accelerator.wait_for_everyone()
        return self.output / "lora.safetensors"

    def _record_trajectories(self) -> None:
        section = self.recipe.trajectories
        stage = recording_stage(self.recipe, sum(count for _, _, count in own_batches(section, self.accelerator)))
        self.time_left.stages.insert(0, stage)

        def advance(count: int, seconds: float | None) -> None:
            self.time_left.advance(count, seconds)
            self._show(f"{stage.done} of {stage.units} teacher trajectories")

        folder, minutes = self.output / "trajectories", self.clock.recording_minutes()
        recorded = self.rollouts.record(folder, self.state.teacher_hash, minutes, advance)
        stage.units = stage.done  # fewer than planned where the time was over
        logger.info("%d teacher trajectories after %.0f s", recorded, self.clock.elapsed)

    def _make_updates(self) -> None:
        recipe, state = self.recipe, self.state
        since, logged = now(), state.update
        while (progress := self.clock.progress()) < 1:
            phase = phase_at(recipe, progress)
            factor = learning_rate_factor(recipe.optimizer, state.update, progress)
            self.updater.update(state, phase, factor)
            if state.update % recipe.log_every == 0:
                self._check_finite()
                self._log(phase, progress, factor, state.update - logged, now() - since)
                since, logged = now(), state.update
            if recipe.checkpoint.every and state.update % recipe.checkpoint.every == 0:
                self._save_checkpoint()
            if recipe.preview.every and state.update % recipe.preview.every == 0:
                self._draw_preview()
        self.log.show(1.0, 0.0, f"{state.update} updates")

    def _log(self, phase: PhaseSection, progress: float, factor: float, updates: int, seconds: float) -> None:
        """Write the means since the last line, which is ``updates`` and ``seconds`` ago."""
        recipe = self.recipe
        terms = self.updater.means.take()
        images = recipe.batch_size * recipe.gradient_accumulation * self.accelerator.num_processes
        speed = updates * images / seconds
        facts = {
            "update": self.state.update,
            "phase": phase.name,
            "progress": round(progress, 4),
            "lr": float(f"{recipe.optimizer.lr * factor:.4g}"),
            "images_per_second": round(speed, 2),
            "seconds": round(self.clock.elapsed, 1),
        }
        self.log.record(facts, terms)
        self.time_left.advance(updates, seconds)
        losses = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
        self._show(f"update {self.state.update}, {phase.name}  {losses}  {speed:.1f} images/s")

    def _show(self, note: str) -> None:
        limit = self.clock.seconds_left
        self.log.show(self.time_left.share(limit), self.time_left.seconds(limit), note)

    def _check_finite(self) -> None:
        if bool(self.updater.finite):
            return
        good = f"the last good checkpoint is {self.good_checkpoint}" if self.good_checkpoint else "no checkpoint yet"
        raise TrainingDiverged(
            f"a loss or gradient is not a finite number at update {self.state.update} or shortly before; {good}. "
            "Resume with a lower optimizer.lr, or without reduced precision"
        )

    def _save_checkpoint(self) -> None:
        """Save a checkpoint, unless this update is already saved."""
        self._check_finite()
        if self.good_checkpoint == checkpoint.checkpoint_path(self.output, self.state.update):
            return
        self.state.elapsed = self.clock.elapsed
        self.good_checkpoint = checkpoint.save(
            self.output,
            self.parts.trained,
            self.state,
            self.recipe.digest(),
            {"training": self.rollouts.generator},
            self.accelerator,
            self.recipe.checkpoint.keep,
        )

    def _draw_preview(self) -> None:
        if self.preview is not None:
            with self.accelerator.autocast(), self.parts.average.applied():
                grid = self.preview.draw()
            save_preview(grid, self.output, self.state.update)
            self.log.picture(grid, self.state.update)
        self.accelerator.wait_for_everyone()
