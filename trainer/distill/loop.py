"""The training loop: record trajectories or not, then update phase by phase, with checkpoints and previews between.

accelerate owns the device, the precision and the processes. The networks are not wrapped in DistributedDataParallel:
its hooks would miss roles that change inside a step and a backward pass that is split. The weights that train are few,
so their gradients are averaged across processes once an update (``update.py``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..config import PhaseSection, Recipe
from ..data.batches.rollouts import Rollouts
from ..data.batches.trajectories import own_batches
from ..data.reading import check_source
from ..errors import UserError
from ..export.base_facts import write_base_facts
from ..export.export import export_run
from ..export.training_state import TrainingState
from ..files import write_text_whole, writing
from ..health.figures import OVER, WARNINGS, health_figures, is_preview
from ..health.monitor import HealthMonitor
from ..interrupts import Interrupted, StopRequest
from ..recipes import LORA_FILE
from ..seeds import seed_of
from ..teachers.in_memory.stages import NETWORK
from . import checkpoint
from .assembly import Assembly, assemble
from .passes import passes_of_an_image
from .preview import Preview, preview_path, preview_rows, save_preview
from .processes import device_errors_explained, in_main_process, only_run_in, start_accelerator
from .schedule import RunClock, learning_rate_factor, now, phase_at
from .several.peers import watched
from .several.resuming import goes_on_exactly, shared_again
from .time_left import TimeLeft, phase_stages, recording_stage
from .training_log import TrainingLog
from .update import Updater

logger = logging.getLogger(__name__)


class TrainingDiverged(UserError):
    """A loss or a gradient is infinite or NaN."""


def distil(recipe: Recipe, output: Path, *, resume: bool = False, stop: StopRequest | None = None) -> Path:
    """Run a whole distillation and return the path of the exported LoRA.

    Args:
        recipe: all settings.
        output: the run's folder; it is made where it is missing.
        resume: continue from the last intact checkpoint in ``output``, or begin where there is none.
        stop: asked after each update; the run then saves a checkpoint and ends.

    Raises:
        UserError: the recipe does not fit the model or the data, the folder holds another run, training diverged, or
            the disk or the memory is full.
        Interrupted: ``stop`` was asked.
    """
    accelerator = start_accelerator(recipe.precision)
    check_source(recipe.data)
    if not accelerator.is_main_process:
        logger.setLevel(logging.WARNING)
    stop = stop or StopRequest()
    with only_run_in(output, accelerator):
        stop.check(accelerator)
        last = in_main_process(accelerator, lambda: _last_checkpoint(output, resume))
        with watched(output, accelerator) as peers, device_errors_explained(recipe, output, peers):
            lora = Run(recipe, output, accelerator, last, stop).train()
    logger.info("the LoRA is at %s", lora)
    logger.info("to measure its stochasticity: flash-diffusion evaluate --run %s --tune-sampler --write", output)
    return lora


def _last_checkpoint(output: Path, resume: bool) -> Path | None:
    """Return the checkpoint to continue from, None for a new run."""
    if checkpoint.checkpoints(output) and not resume:
        raise UserError(f"{output} already holds a run; continue it with --resume, or choose another --output")
    last = checkpoint.last_intact(output)
    with writing(output / "checkpoints"):
        checkpoint.set_aside(output, last)
    return last


class Run:
    """One session of a distillation.

    Args:
        last: the checkpoint to continue from, or None.
        stop: asked after each update.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        accelerator: Accelerator,
        last: Path | None,
        stop: StopRequest | None = None,
    ) -> None:
        self.given = recipe
        self.output = output
        self.accelerator = accelerator
        self.stop = stop or StopRequest()
        self.state, digest = checkpoint.read_facts(last) if last else (TrainingState(), recipe.digest())
        if digest != recipe.digest():
            logger.warning("the recipe has changed since %s: the result belongs to neither recipe", last)
        else:
            recipe = shared_again(recipe, self.state, accelerator.num_processes)
        self.recipe = recipe
        self.clock = RunClock(recipe, self.state, accelerator)
        self.parts: Assembly = assemble(recipe, accelerator, self.stop, resumed=last is not None)
        teacher, examples = self.parts.teacher, self.parts.examples
        self.rollouts = Rollouts(recipe, teacher, self.parts.task, examples, self.parts.distiller, accelerator)
        self.updater = Updater(recipe, self.parts, self.rollouts, accelerator)
        self.preview: Preview | None = None
        if accelerator.is_main_process or recipe.sharding != "none":
            self.preview = Preview(recipe, preview_rows(self.parts, recipe.preview.prompts))
        self._identify(teacher.weights_hash(), examples.fingerprint)
        if not recipe.data.stream:
            teacher.release_encoders()
        if recipe.memory.offload:
            teacher.stages.enter(NETWORK)
        else:
            teacher.stages.end()
        if last is not None:
            self._restore(last)
        self.state.processes, self.state.samples = accelerator.num_processes, self.rollouts.samples
        self.good_checkpoint = last
        self.stop.check(accelerator)
        self.log = TrainingLog(output, self.state.update, accelerator.is_main_process)
        self.health = HealthMonitor(recipe, self.log.kept)
        self._compiled = 0
        self.drawn = {entry["update"] for entry in self.log.kept if is_preview(entry)}
        self.time_left = TimeLeft(phase_stages(recipe, self.state.update))

    def _identify(self, teacher_hash: str, data_fingerprint: str) -> None:
        """Compare the teacher and the data with those of the updates that are made, and keep what they are."""
        state = self.state
        if state.update and state.teacher_hash and state.teacher_hash != teacher_hash:
            raise UserError(
                f"{self.output} holds {state.update} updates with another teacher (its weights have the hash "
                f"{state.teacher_hash[:16]}, those of {self.recipe.model.path} {teacher_hash[:16]}). Resume with the "
                f"teacher that {self.output / 'config.yaml'} names, or choose another --output"
            )
        if state.update and state.data_fingerprint and state.data_fingerprint != data_fingerprint:
            logger.warning(
                "the data have changed since update %d: the samples come in another order, and the result belongs to "
                "both data sets. For a run on the present data alone choose another --output",
                state.update,
            )
        state.teacher_hash, state.data_fingerprint = teacher_hash, data_fingerprint

    def _restore(self, last: Path) -> None:
        """Continue from a checkpoint: exactly, or as well as a number of processes that shares no batch evenly can."""
        accelerator, update = self.accelerator, self.state.update
        checkpoint.restore_shared(last, self.parts.trained)
        before, rank = checkpoint.count_processes(last, self.state), accelerator.process_index
        if goes_on_exactly(self.recipe, self.state, last, before, accelerator.num_processes, logger):
            # What a process keeps is the same in all of them, so a new process takes what another one kept.
            kept = min(rank, before - 1)
            own = checkpoint.restore_own(last, kept, {"training": self.rollouts.generator})
            self.updater.restore_own(own)
            return
        self.rollouts.generator.manual_seed(seed_of(self.recipe.seed, "training", 0, "resumed", update))
        torch.manual_seed(seed_of(self.recipe.seed, "torch", rank, "resumed", update))

    def train(self) -> Path:
        """Train to the end, export, and return the path of the LoRA.

        Raises:
            Interrupted: the run was asked to stop; its updates are in a checkpoint.
        """
        if self.accelerator.is_main_process:
            write_text_whole(self.output / "config.yaml", self.given.to_yaml())
            write_base_facts(self.output, self.recipe, self.parts.teacher)
        try:
            with self.log.progress:
                if self.recipe.trajectories.reuse:
                    self.rollouts.open_bank(self.output / "trajectories", self.state.teacher_hash)
                elif self.recipe.trajectories.count:
                    self._record_trajectories()
                if self.state.update == 0:
                    self.state.training_since = self.clock.elapsed
                self._make_updates()
                self._finish()
        except Interrupted:
            if self.state.update:
                self._save_checkpoint()
            self.log.close()
            raise
        finally:
            self.rollouts.close()
        return self.output / LORA_FILE

    def _finish(self) -> None:
        """Save the last checkpoint, draw the last preview and export."""
        if self.state.update == 0:
            raise UserError(
                f"limits.max_minutes: {self.recipe.limits.max_minutes:g} minutes were over before the first update, "
                f"after {self.clock.elapsed / 60:.1f}; nothing was learnt. Raise it, or lower trajectories.count; "
                "--resume keeps the recorded trajectories"
            )
        self.log.show(1.0, 0.0, f"{self.state.update} updates; writing the last checkpoint, the preview and the LoRA")
        self._save_checkpoint()
        self._draw_preview(self.recipe.phases[-1])
        self.log.close()
        logger.info("health: %s", self.health.summary() or "the run was too short to judge it")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            export_run(self.output, self.recipe, self.parts.average.tensors, self.state)
        self.accelerator.wait_for_everyone()

    def _record_trajectories(self) -> None:
        section = self.recipe.trajectories
        stage = recording_stage(self.recipe, sum(count for _, _, count in own_batches(section, self.accelerator)))
        self.time_left.stages.insert(0, stage)

        def advance(count: int, seconds: float | None) -> None:
            self.time_left.advance(count, seconds)
            self._show(f"{stage.done} of {stage.units} teacher trajectories")

        folder, minutes = self.output / "trajectories", self.clock.recording_minutes()
        recorded = self.rollouts.record(folder, self.state.teacher_hash, minutes, advance, self.stop)
        self.parts.counted.forget("trajectories")  # the log counts what updates cost
        stage.units = stage.done  # fewer than planned where the time was over
        logger.info("%d teacher trajectories after %.0f s", recorded, self.clock.elapsed)

    def _refresh_trajectories(self) -> None:
        """Record the trajectories that the next update replays. Between updates: a stop may come here."""
        if (bank := self.rollouts.refreshed) is None:
            return
        batches = self.rollouts.numbers(self.state.position)
        if bank.due(batches):
            bank.refresh(batches, self.stop, lambda done, count: self._show(f"{done} of {count} new trajectories"))
            self.stop.check(self.accelerator)
            if not self.recipe.checkpoint.every:
                bank.prune(batches[0])

    def _make_updates(self) -> None:
        recipe, state = self.recipe, self.state
        since, logged = now(), state.update
        while (progress := self.clock.progress()) < 1:
            phase = phase_at(recipe, progress)
            factor = learning_rate_factor(recipe.optimizer, state.update, progress)
            since += self._warm_up(phase)
            self._refresh_trajectories()
            self.updater.update(state, phase, factor)
            if state.update % recipe.log_every == 0:
                self._check_finite()
                self._log(phase, progress, factor, state.update - logged, now() - since)
                since, logged = now(), state.update
            if recipe.preview.every and state.update % recipe.preview.every == 0:
                self._draw_preview(phase)
            if recipe.checkpoint.every and state.update % recipe.checkpoint.every == 0:
                self._save_checkpoint()  # after the log's lines of this update: a session that goes on has them all
            self.stop.check(self.accelerator)

    def _warm_up(self, phase: PhaseSection) -> float:
        """Let discriminator and critic learn alone, where the recipe wants it before ``phase``; return the seconds."""
        begin = now()
        self._refresh_trajectories()
        for made, wanted in self.updater.warm_up(self.state, phase):
            self._show(f"{made} of {wanted} updates of discriminator and critic alone, before {phase.name}")
            self.stop.check(self.accelerator)
            self._refresh_trajectories()
        return now() - begin

    def _log(self, phase: PhaseSection, progress: float, factor: float, updates: int, seconds: float) -> None:
        """Write the means since the last line, which is ``updates`` and ``seconds`` ago."""
        recipe = self.recipe
        self.updater.share_means()
        terms = self.updater.means.take()
        figures = health_figures(terms)
        images = recipe.batch_size * recipe.gradient_accumulation * self.accelerator.num_processes
        speed = updates * images / seconds
        passes, unconditional = passes_of_an_image(self.parts.counted)
        facts = {
            "update": self.state.update,
            "phase": phase.name,
            "progress": round(progress, 4),
            "lr": float(f"{recipe.optimizer.lr * factor:.4g}"),
            "images_per_second": round(speed, 2),
            "seconds": round(self.clock.elapsed, 1),
            **self.rollouts.replay_facts(self.state.position),
            "passes": passes,
            "unconditional": unconditional,
            **self._compiling(),
        }
        self._record(facts, figures)
        self.time_left.advance(updates, seconds)
        losses = "  ".join(f"{name} {value:.4g}" for name, value in terms.items() if name in figures)
        self._show(f"update {self.state.update}, {phase.name}  {losses}  {speed:.1f} images/s")

    def _compiling(self) -> dict[str, float]:
        """Return what torch.compile took in this session, for the log; say it when it has grown."""
        clock = self.parts.compiling
        if clock is None:
            return {}
        if clock.count > self._compiled:
            self._compiled = clock.count
            logger.info("%s", clock)
        return {"compilations": clock.count, "compile_seconds": round(clock.seconds, 1)}

    def _record(self, facts: dict[str, Any], figures: dict[str, float]) -> None:
        """Write a line of the log, and say what it tells of the run's health."""
        if not self.accelerator.is_main_process:
            return
        told = self.health.observe({**facts, **figures})
        self.log.record(facts, figures, told)
        for sentence in told.get(WARNINGS, ()):
            logger.warning("update %d: %s", self.state.update, sentence)
        for sentence in told.get(OVER, ()):
            logger.info("update %d: over: %s", self.state.update, sentence)

    def _show(self, note: str) -> None:
        limit = self.clock.seconds_left
        self.log.show(self.time_left.share(limit), self.time_left.seconds(limit), note)

    def _check_finite(self) -> None:
        if bool(self.updater.finite):
            return
        good = f"the last good checkpoint is {self.good_checkpoint}" if self.good_checkpoint else "no checkpoint yet"
        before = "".join(f". Before, {alarm.text}" for alarm in self.health.alarms)
        raise TrainingDiverged(
            f"a loss or gradient is not a finite number at update {self.state.update} or shortly before; {good}. "
            f"Resume with a lower optimizer.lr, or without reduced precision{before}"
        )

    def _save_checkpoint(self) -> None:
        """Save a checkpoint, unless this update is already saved."""
        self._check_finite()
        if self.good_checkpoint == checkpoint.checkpoint_path(self.output, self.state.update):
            return
        self.state.elapsed = self.clock.elapsed
        self.log.flush()
        self.good_checkpoint = checkpoint.save(
            self.output,
            self.parts.trained,
            self.state,
            self.given.digest(),
            {"training": self.rollouts.generator},
            self.updater.own_state(),
            self.accelerator,
            self.recipe.checkpoint.keep,
        )
        if self.rollouts.refreshed is not None:
            self.rollouts.refreshed.prune(self.rollouts.numbers(self.state.position)[0])

    def _draw_preview(self, phase: PhaseSection) -> None:
        update = self.state.update
        drawn = in_main_process(
            self.accelerator, lambda: update in self.drawn and preview_path(self.output, update).is_file()
        )
        if self.preview is not None and not drawn:
            with self.accelerator.autocast(), self.parts.average.applied():
                drawing = self.preview.draw()
            if self.accelerator.is_main_process:
                save_preview(drawing.grid, self.output, update)
            self.log.picture(drawing.grid, update)
            if update not in self.drawn:
                self._record({"update": update, "phase": phase.name}, drawing.figures)
            self.drawn.add(update)
        self.accelerator.wait_for_everyone()
