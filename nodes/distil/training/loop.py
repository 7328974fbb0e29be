"""Train a LoRA on a denoiser: record the teacher's trajectories, then make the updates, and resume exactly.

It knows no ComfyUI: the denoiser raises ComfyUI's exception when the user interrupts, and after any exception the
updates and trajectories so far are in the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ....flash_core.denoiser import Denoiser, Role
from ....flash_core.discriminator import Discriminator
from ....flash_core.distiller import Distiller, Rollout
from ....flash_core.runs.schedule import WeightAverage, warmup_cosine
from ....flash_core.runs.seeds import seed_of, stream
from ....flash_core.terms.adversarial import Seen
from .examples import Examples, TrajectoryBank, in_order
from .settings import (
    AVERAGE_DECAY,
    BETAS,
    CLIP_NORM,
    DISCRIMINATOR_BETAS,
    FLAT,
    WARMUP,
    DistilSettings,
    Stage,
)
from .state import RunFolder

SAVE_SECONDS = 120.0  # at most so much work is lost where the process is killed


class TrainableDenoiser(Denoiser, Protocol):
    """A denoiser that can get adapters."""

    def add_adapter(self, role: Role, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> None:
        """Give a role a new LoRA that changes nothing yet."""
        ...

    def adapter_parameters(self, role: Role) -> Mapping[str, nn.Parameter]:
        """Return the parameters of a role's adapter by name."""
        ...


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        doing: "trajectories", "helpers" (discriminator and critic) or "updates".
        done, total: of these.
        seconds: of this session for what it has ``made`` of these, so that the rest can be estimated.
        made: in this session.
        terms: losses of the last update by name.
    """

    doing: str
    done: int
    total: int
    seconds: float = 0.0
    made: int = 0
    terms: Mapping[str, float] = field(default_factory=dict)


class Training:
    """One run, from its start or from where its folder says that it is.

    Args:
        denoiser: its role ``student`` gets the new LoRA, and ``critic`` another one where the settings want it.
        settings: everything that decides the result.
        examples: what to learn from.
        folder: of the run's state.
        observe: called after every batch of trajectories and after every update, when the state is whole.

    Attributes:
        update: updates that are made.
        losses: the distillation loss of each update.
        notes: what else must be kept with the state, for the caller.
    """

    def __init__(
        self,
        denoiser: TrainableDenoiser,
        settings: DistilSettings,
        examples: Examples,
        folder: RunFolder,
        observe: Callable[[Progress], None],
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.examples = examples
        self.folder = folder
        self.observe = observe
        denoiser.add_adapter("student", settings.rank, settings.rank, settings.targets, settings.seed)
        self.parameters: dict[str, Mapping[str, nn.Parameter]] = {"student": denoiser.adapter_parameters("student")}
        helpers = settings.discriminator_rate
        self.rates = {"student": settings.learning_rate, "discriminator": helpers, "critic": helpers}
        betas = {"student": BETAS, "discriminator": DISCRIMINATOR_BETAS, "critic": BETAS}
        discriminator = self._discriminator() if settings.adversarial else None
        if discriminator is not None:
            self.parameters["discriminator"] = dict(discriminator.named_parameters())
        if settings.critic:
            seed = seed_of(settings.seed, "critic")
            denoiser.add_adapter("critic", settings.rank, settings.rank, settings.targets, seed)
            self.parameters["critic"] = denoiser.adapter_parameters("critic")
        self.optimizers = {
            name: torch.optim.AdamW(values.values(), self.rates[name], betas[name], weight_decay=0.0)
            for name, values in self.parameters.items()
        }
        self.average = WeightAverage(self.parameters["student"], AVERAGE_DECAY)
        self.distiller = Distiller(denoiser, settings.of_distiller(), discriminator=discriminator)
        self.generator = stream(settings.seed, "training", 0)
        self.bank: TrajectoryBank | None = None
        self.update = 0
        self.position = 0  # samples that were drawn so far
        self.warmed_up = 0  # updates of discriminator and critic alone
        self.losses: list[float] = []
        self.notes: dict[str, Any] = {}
        self._saved = (0, 0)
        self._seconds, self._begin = 0.0, time.monotonic()  # of earlier sessions, and the start of this one
        self._restore()

    @property
    def finished(self) -> bool:
        """Whether all updates are made."""
        return self.update >= self.settings.budget.updates

    @property
    def seconds(self) -> float:
        """Seconds over all sessions."""
        return self._seconds + time.monotonic() - self._begin

    def run(self) -> None:
        """Make what is missing of the trajectories and the updates.

        Raises:
            ValueError: training diverged.
        """
        try:
            if self.settings.replays and not self.finished:
                self._record()
            self._make_updates()
        except BaseException:
            self.save()
            raise
        self.save()
        self.folder.forget_parts()

    def save(self) -> None:
        """Write the state, unless it is already there."""
        state = (self.update, self.warmed_up)
        if state == self._saved:
            return
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for part, parameters in self.parameters.items():
            tensors |= {f"{part}/{name}": value for name, value in parameters.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.tensors.items()}
        for part, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{part}/{index}/{key}": torch.as_tensor(value) for key, value in moments.items()}
        facts = {
            "update": self.update,
            "position": self.position,
            "warmed_up": self.warmed_up,
            "losses": self.losses,
            "notes": self.notes,
            "seconds": self.seconds,
        }
        self.folder.save(tensors, facts)
        self._saved = state

    # -- the teacher's trajectories ------------------------------------------------------------------------------

    def _record(self) -> None:
        """Record the trajectories that the folder lacks; each batch has its own random stream and its own file."""
        size, total = self.settings.recorded_at_once, self.settings.budget.trajectories
        parts: list[dict[str, Tensor]] = []
        begin, made = time.monotonic(), 0
        for number, first in enumerate(range(0, total, size)):
            count = min(size, total - first)
            part = self.folder.load_part(number)
            if part is None:
                samples = in_order(len(self.examples), self.settings.seed, first, count)
                trajectory = self.distiller.trajectory(
                    self.examples.latents_of(samples),
                    *self.examples.conditions_of(samples),
                    stream(self.settings.seed, "trajectory", number),
                )
                part = TrajectoryBank.part_of(trajectory, samples)
                self.folder.save_part(number, part)
                made += count
            parts.append(part)
            self.observe(Progress("trajectories", first + count, total, time.monotonic() - begin, made))
        self.bank = TrajectoryBank(self.distiller.recorded_indices(), parts)

    # -- the updates ---------------------------------------------------------------------------------------------

    def _make_updates(self) -> None:
        stages = self.settings.stages()
        begin, made, saved = time.monotonic(), 0, time.monotonic()
        total = self.settings.budget.updates
        first = 0
        for number, stage in enumerate(stages):
            end = first + stage.updates
            if self.update < end and number > 0:
                self._warm_up(stage, number)
            while self.update < end:
                terms = self._make_update(stage, number)
                made += 1
                self.observe(Progress("updates", self.update, total, time.monotonic() - begin, made, terms))
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
            first = end

    def _make_update(self, stage: Stage, number: int) -> dict[str, float]:
        """Make one update of everything that the stage trains, and return its losses.

        All gradients are computed before anything changes, so an interrupt undoes the whole update.
        """
        means: dict[str, float] = {}
        share = 1 / self.settings.batches
        with self._undone_on_failure():
            for _ in range(self.settings.batches):
                rollout = self._rollout(stage, number)
                step = self.distiller.student_step(rollout, stage.phase, self.generator, share)
                terms = step.terms | self._teach(rollout, step.z_student, stage, share, step.seen)
                for name, value in terms.items():
                    means[name] = means.get(name, 0.0) + share * float(value)
            self._clip(means)
        factor = self._factor()
        self._step("student", factor * stage.rate)
        self._step("discriminator", factor)
        self._step("critic", factor)
        self.average.update(self.update)
        self.update += 1
        self.losses.append(means["distillation"])
        return means

    def _warm_up(self, stage: Stage, number: int) -> None:
        """Let discriminator and critic learn alone, before the student listens to them."""
        total = self.settings.warmup
        begin, made = time.monotonic(), 0
        while self.warmed_up < total:
            with self._undone_on_failure():
                share = 1 / self.settings.batches
                for _ in range(self.settings.batches):
                    rollout = self._rollout(stage, number)
                    with torch.no_grad(), self.denoiser.role("student"):
                        z_student = self.distiller.student_output(rollout)
                    self._teach(rollout, z_student, stage, share)
                self._clip({})
            self._step("discriminator", 1.0)
            self._step("critic", 1.0)
            self.warmed_up += 1
            made += 1
            self.observe(Progress("helpers", self.warmed_up, total, time.monotonic() - begin, made))

    def _teach(
        self, rollout: Rollout, z_student: Tensor, stage: Stage, share: float, seen: Seen | None = None
    ) -> dict[str, Tensor]:
        """Leave the gradients of discriminator and critic, where the stage has them, and return their losses."""
        terms: dict[str, Tensor] = {}
        if stage.phase.adversarial:
            terms |= self.distiller.discriminator_step(rollout, z_student, self.generator, share, seen)
        if stage.phase.dmd and self.settings.critic:
            z, part, batch = self.distiller.critic_samples(rollout, z_student, self.generator)
            if len(z):
                terms |= self.distiller.critic_step(z, part.conditioning, batch, share, part)
        return terms

    def _rollout(self, stage: Stage, number: int) -> Rollout:
        """Return the next batch."""
        count = self.settings.at_once
        if self.bank is None:
            samples = in_order(len(self.examples), self.settings.seed, self.position, count)
            self.position += count
            conditions = self.examples.conditions_of(samples)
            return self.distiller.rollout(self.examples.latents_of(samples), *conditions, stage.phase, self.generator)
        first, length = self._own_trajectories(number)
        index = first + in_order(length, self.settings.seed, self.position, count)
        self.position += count
        return self.distiller.replay(self.bank.batch(index, self.examples), stage.phase, self.generator)

    def _own_trajectories(self, number: int) -> tuple[int, int]:
        """Return a stage's first trajectory and their number: heads need noise that the student has not learnt."""
        assert self.bank is not None
        updates = [stage.updates for stage in self.settings.stages()]
        ends = [round(len(self.bank) * sum(updates[:count]) / sum(updates)) for count in range(len(updates) + 1)]
        first, end = ends[number], ends[number + 1]
        return (first, end - first) if end > first else (0, len(self.bank))

    def _factor(self) -> float:
        """Return the learning rates' share of their full value."""
        updates = self.settings.budget.updates
        return warmup_cosine(self.update, self.update / updates, warmup=min(WARMUP, max(1, updates // 5)), flat=FLAT)

    def _clip(self, means: Mapping[str, float]) -> None:
        """Clip all gradients.

        Raises:
            ValueError: a gradient is NaN or infinite.
        """
        for parameters in self.parameters.values():
            if not bool(nn.utils.clip_grad_norm_(parameters.values(), CLIP_NORM).isfinite()):
                raise ValueError(
                    f"Training diverged at update {self.update + 1}: a gradient is NaN or infinite (losses: "
                    f"{dict(means)}). Choose a lower learning_rate than {self.settings.learning_rate:g}, or a lower "
                    "guidance. If it happens at the first update, the model overflows in half precision: start "
                    "ComfyUI with --force-fp32."
                )

    def _step(self, part: str, factor: float) -> None:
        """Step an optimiser, if its parameters have gradients."""
        optimizer = self.optimizers.get(part)
        if optimizer is None:
            return
        for group in optimizer.param_groups:
            group["lr"] = self.rates[part] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        """Give generator and position back their values, and forget all gradients, where the block fails."""
        generator, position = self.generator.get_state(), self.position
        try:
            yield
        except BaseException:
            self.generator.set_state(generator)
            self.position = position
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            raise

    # -- begin, or begin again -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _discriminator(self) -> Discriminator:
        """Return new heads for the teacher's hidden states, and one for the latents."""
        conditions, _ = self.examples.conditions_of(torch.zeros(1, dtype=torch.long))
        z = torch.zeros(1, *self.examples.shape, device=self.examples.device)
        t = torch.full((1,), self.denoiser.process.timestep(0.5), device=self.examples.device)
        channels = [state.shape[1] for state in self.denoiser.features(z, t, conditions)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.settings.seed, "discriminator"))
            return Discriminator(channels, latents=self.examples.shape[0]).to(self.examples.device)

    def _restore(self) -> None:
        """Continue from the folder's state, if there is one."""
        found = self.folder.load()
        if found is None:
            return
        tensors, facts = found
        with torch.no_grad():
            for part, parameters in self.parameters.items():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[f"{part}/{name}"])
            for name, value in self.average.tensors.items():
                value.copy_(tensors[f"average/{name}"])
        for part, optimizer in self.optimizers.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer/{part}/"):
                    index, key = name.removeprefix(f"optimizer/{part}/").split("/")
                    moments.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        self.generator.set_state(tensors["generator"])
        self.update, self.position, self.warmed_up = (facts[name] for name in ("update", "position", "warmed_up"))
        self.losses, self.notes = list(facts["losses"]), dict(facts["notes"])
        self._seconds = float(facts["seconds"])
        self._saved = (self.update, self.warmed_up)
