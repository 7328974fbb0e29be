"""A run's rollouts, batch by batch: solved by the teacher now, or replayed from recorded trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ....flash_core.denoiser import Conditioning
from ....flash_core.distiller import Distiller, Rollout
from ....flash_core.terms.shared_batch import Random, SharedBatch, even_shares, strided_shares
from ...config import PhaseSection, Recipe
from ...errors import UserError
from ...interrupts import StopRequest
from ...seeds import stream
from ..cache.store import Store
from ..encoding.examples import CachedExamples
from ..streaming.examples import StreamBatches, StreamExamples
from .order import Order
from .replay import ReplayBank, frame_of_trajectory
from .rounds import Rounds
from .trajectories import Recorder, TrajectoryBank, check_recorded, record_trajectories, trajectory_fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...tasks.base import Task
    from ...teachers.base import Teacher


class Rollouts:
    """Draws the batches of one process in the order of the seed.

    Args:
        distiller: solves or replays.
        examples: pictures with their conditions, encoded in the cache or as they come.

    Attributes:
        generator: the random stream, which all processes and the training steps share; a checkpoint keeps its state.
        draws: what the training steps draw from: the generator, as this process's part of the last batch.
        samples: of a batch, in all processes together.
        shares: of each process, the positions in the last batch of its samples.
        order: of the examples; None for a stream.
        replays: of each phase: its first recorded trajectory, and the order of its trajectories.
        refreshed: the trajectories that are replaced while training; None without ``trajectories.reuse``.
        streamed: reads a stream; None for examples in the cache.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        task: Task,
        examples: CachedExamples | StreamExamples,
        distiller: Distiller,
        accelerator: Accelerator,
    ) -> None:
        self.recipe = recipe
        self.teacher = teacher
        self.task = task
        self.examples = examples
        self.distiller = distiller
        self.accelerator = accelerator
        self.generator = stream(recipe.seed, "training", 0)
        rank, ranks = accelerator.process_index, accelerator.num_processes
        self.samples = ranks * recipe.batch_size
        self._share(strided_shares(self.samples, ranks))
        self.bank: TrajectoryBank | None = None
        self.refreshed: ReplayBank | None = None
        self.streamed: StreamBatches | None = None
        self.order: Order | None = None
        self.replays: list[tuple[int, Order]] = []
        if isinstance(examples, StreamExamples):
            self.streamed = StreamBatches(examples, rank, ranks, recipe.batch_size)
        else:
            self.order = Order(len(examples), recipe.seed, examples.frames, self.samples)

    def fingerprint(self, teacher_hash: str) -> str:
        """Return the fingerprint of this run's trajectories, see :func:`trajectory_fingerprint`."""
        control = getattr(self.teacher.denoiser, "control", None)
        process = self.teacher.denoiser.process
        return trajectory_fingerprint(self.recipe, self.examples.fingerprint, teacher_hash, process, control)

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
        assert isinstance(self.examples, CachedExamples)  # the recipe was checked
        self.bank = record_trajectories(
            folder,
            self.recipe.trajectories.model_copy(update={"max_minutes": max_minutes}),
            self.distiller,
            self.examples,
            self._unconditional,
            self.accelerator,
            self.recipe.seed,
            self.fingerprint(teacher_hash),
            advance,
            stop,
            self.recipe.data.caption_dropout,
        )
        self.replays = self._replays(self.bank)
        return len(self.bank)

    def open_bank(self, folder: Path, teacher_hash: str) -> None:
        """Open the bank of trajectories in ``folder`` that is refreshed while training; nothing is recorded yet.

        Raises:
            UserError: the folder holds trajectories of another recipe, or a process would get too few.
        """
        assert isinstance(self.examples, CachedExamples)  # the recipe was checked
        section, accelerator, seed = self.recipe.trajectories, self.accelerator, self.recipe.seed
        assert section.reuse is not None
        fingerprint = self.fingerprint(teacher_hash)
        check_recorded(folder, fingerprint)
        capacity = section.count // accelerator.num_processes
        if capacity < section.reuse:
            raise UserError(
                f"trajectories.count {section.count} gives each of {accelerator.num_processes} processes {capacity}, "
                f"and each is to be used {section.reuse:g} times (trajectories.reuse): a round would begin without a "
                f"new one. Set count to {math.ceil(section.reuse) * accelerator.num_processes} or more, or reuse lower"
            )
        recorder = Recorder(
            Store(folder),
            Order(len(self.examples), seed, self.examples.frames, section.batch),
            section.batch,
            self.distiller,
            self.examples,
            self._unconditional,
            accelerator,
            seed,
            fingerprint,
            self.recipe.data.caption_dropout,
        )
        if accelerator.is_main_process:
            recorder.describe(folder)
        accelerator.wait_for_everyone()
        frame_of, rank, size = frame_of_trajectory(recorder), accelerator.process_index, self.recipe.batch_size
        rounds = Rounds(capacity, section.reuse, size, seed, rank, frame_of=frame_of)
        self.refreshed = ReplayBank(recorder, rounds, section.memory * 2**30)

    def numbers(self, position: int) -> range:
        """Return the numbers of this process's batches of the update at ``position``, in samples of all processes."""
        first = position // (self.recipe.batch_size * self.accelerator.num_processes)
        return range(first, first + self.recipe.gradient_accumulation)

    def replay_facts(self, position: int) -> dict[str, float]:
        """Return for the log how many trajectories were made, and their mean uses, before the update at ``position``.

        Empty without a refreshed bank.
        """
        batches = self.numbers(position)[0]
        if self.refreshed is None or not batches:
            return {}
        made = self.refreshed.made(batches - 1)
        samples = batches * self.recipe.batch_size
        return {"trajectories": made * self.accelerator.num_processes, "uses": round(samples / made, 3)}

    def _replays(self, bank: TrajectoryBank) -> list[tuple[int, Order]]:
        phases = self.recipe.phases
        ranges = [(0, len(bank))] * len(phases)
        if self.recipe.trajectories.split:
            ranges = phase_ranges(len(bank), [phase.updates for phase in phases])
        frames, seed = bank.frames, self.recipe.seed
        return [
            (first, Order(end - first, seed, None if frames is None else frames[first:end], self.samples))
            for first, end in ranges
        ]

    def batch(self, position: int, section: PhaseSection) -> Rollout:
        """Return this process's rollout of the batch at ``position``, in samples of all processes together."""
        phase, ranks = section.phase(), self.accelerator.num_processes
        self._share(strided_shares(self.samples, ranks))
        if self.streamed is not None:
            z0, conditioning = self.streamed.encoded(position)
            return self.distiller.rollout(z0, conditioning, self._unconditional(conditioning), phase, self.draws)
        assert isinstance(self.examples, CachedExamples)
        assert self.order is not None
        if self.refreshed is not None:
            return self.distiller.replay(self.refreshed.batch(self.numbers(position)[0]), phase, self.draws)
        device = self.accelerator.device
        if self.bank is not None:
            first, order = self.replays[self.recipe.phases.index(section)]
            index = first + order.indices(position, self.samples)[self._own]
            trajectory = self.bank.batch(index, self.examples, self._unconditional, device)
            return self.distiller.replay(trajectory, phase, self.draws)
        if ranks > 1 and self.distiller.settings.reads_solution(phase):
            self._share(even_shares(self.distiller.coming_calls(phase, self.draws), ranks))
        index = self.order.indices(position, self.samples)
        counts = self.examples.caption_counts(index)
        caption = self.order.captions(position, counts, self.recipe.data.caption_dropout)
        z0, conditioning = self.examples.batch(index[self._own], device, caption[self._own])
        return self.distiller.rollout(z0, conditioning, self._unconditional(conditioning), phase, self.draws)

    def _share(self, shares: list[tuple[int, ...]]) -> None:
        """Set which samples of a batch each process has."""
        accelerator = self.accelerator
        self.shares = shares
        self.draws: Random = self.generator
        self._own = torch.tensor(shares[accelerator.process_index])
        if accelerator.num_processes > 1:
            self.draws = SharedBatch(
                self.generator,
                self.samples,
                shares[accelerator.process_index],
                add=lambda value: accelerator.reduce(value, "sum"),
                lockstep=self.recipe.sharding != "none",
            )

    def close(self) -> None:
        """End the processes that read a stream."""
        if self.streamed is not None:
            self.streamed.close()

    def _unconditional(self, conditioning: Conditioning) -> Conditioning:
        """Return the conditions of guidance's unconditional branch, for pictures of the same size."""
        empty = self.teacher.unconditional(len(conditioning))
        return self.task.unconditional(conditioning, replace(empty, size_ids=conditioning.size_ids))


def phase_ranges(trajectories: int, updates: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the last + 1 trajectory of each phase, in proportion to the phases' updates.

    Raises:
        UserError: a phase would get none.
    """
    ends = [round(trajectories * done / sum(updates)) for done in accumulate(updates, initial=0)]
    ranges = list(pairwise(ends))
    if any(first == end for first, end in ranges):
        raise UserError(
            f"trajectories.split: {trajectories} trajectories leave none for a phase of {min(updates)} of "
            f"{sum(updates)} updates; record more, or set split to false"
        )
    return ranges
