"""The start of a training step: the teacher's solutions, drawn for the step or recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .denoiser import Conditioning, Denoiser, guided_z0, predict_z0
from .grid import timestep_mixture, trailing_timesteps
from .passes.asking import asked_by
from .passes.guidance import is_guided
from .process import broadcast
from .settings import PUBLISHED_PHASES, DistillerSettings, Phase
from .solvers import solve
from .terms.backward_simulation import draw_paths, simulate
from .terms.draws import normal, uniform
from .terms.shared_batch import Random, SharedBatch, generator_of, shared

# Indices of the teacher's grid less likely than this are not kept when a trajectory is recorded.
RECORDED_PROBABILITY = 1e-3


@dataclass(frozen=True)
class Rollout:
    """The start of each sample of a batch, and the teacher's solution from there.

    Attributes:
        z_t: (B, C, H, W) latents at their start.
        t: (B,) timesteps of the start.
        z_teacher: (B, C, H, W) the teacher's solution; zeros in a phase that does not read it.
        z0: (B, C, H, W) data latents.
        guidance: (B,) the teacher's guidance scale.
        known: the B timesteps as numbers, which are drawn on the CPU; None where ``t`` alone has them.
        shared_starts: the timesteps of the starts of all samples that processes share; empty for these B.
    """

    z_t: Tensor
    t: Tensor
    z_teacher: Tensor
    z0: Tensor
    guidance: Tensor
    conditioning: Conditioning
    unconditional: Conditioning
    known: tuple[float, ...] | None = None
    shared_starts: tuple[float, ...] = ()

    @property
    def starts(self) -> list[float]:
        """The B timesteps as numbers. Waits for the device where they are not ``known``."""
        return self.t.tolist() if self.known is None else list(self.known)

    def all_starts(self) -> Sequence[float]:
        """Return the timesteps of the starts of all samples that processes share."""
        return self.shared_starts or self.starts

    def rows(self, index: Tensor) -> Rollout:
        """Return the samples at ``index`` (b,), which is on the CPU, so that nothing waits for the device."""
        return Rollout(
            self.z_t[index],
            self.t[index],
            self.z_teacher[index],
            self.z0[index],
            self.guidance[index],
            self.conditioning.rows(index),
            self.unconditional.rows(index),
            None if self.known is None else tuple(self.known[row] for row in index.tolist()),
        )


@dataclass(frozen=True)
class Trajectory:
    """The teacher's solutions from pure noise with the states on the path: the starts of several rollouts.

    Attributes:
        indices: the M grid indices that were kept, ascending.
        states: (M, B, C, H, W) the latents at those indices.
    """

    indices: tuple[int, ...]
    states: Tensor
    z_teacher: Tensor
    z0: Tensor
    guidance: Tensor
    conditioning: Conditioning
    unconditional: Conditioning

    def rows(self, index: Tensor) -> Trajectory:
        """Return the samples at ``index`` (b,)."""
        return Trajectory(
            self.indices,
            self.states[:, index],
            self.z_teacher[index],
            self.z0[index],
            self.guidance[index],
            self.conditioning.rows(index),
            self.unconditional.rows(index),
        )


class RolloutSource:
    """Draws where the samples of a batch start, and lets the teacher solve them from there.

    Args:
        denoiser: the backbone, its roles on one frozen base.
        settings: the method's constants.

    Attributes:
        timesteps: the teacher's grid.
    """

    def __init__(self, denoiser: Denoiser, settings: DistillerSettings) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.timesteps = trailing_timesteps(denoiser.process, settings.teacher_steps)

    def rollout(
        self,
        z0: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
        phase: Phase,
        generator: Random,
    ) -> Rollout:
        """Draw timesteps, noise and guidance for a batch of data latents, and let the teacher solve each sample.

        Args:
            z0: (B, C, H, W) data latents; their values are not read where no sample starts at noised data.
            generator: the only source of randomness.
        """
        generator = shared(generator, len(z0))
        every = self.draw_indices(phase, self._starts(), len(z0), generator)
        start = [every[position] for position in generator.own]
        starts = self._starts_at(every)
        known = tuple(starts[position] for position in generator.own)
        t = torch.tensor(known).to(z0.device)
        noise = normal(z0, generator)
        pure = torch.tensor([index == 0 for index in start], device=z0.device)
        z_t = torch.where(broadcast(pure, z0), noise, self.denoiser.process.add_noise(z0, noise, t))
        guidance = self._draw_guidance(len(z0), generator).to(z0.device)
        everyone_on_path, own = self._draw_states(every, generator)
        on_path = {row for row, position in enumerate(generator.own) if position in everyone_on_path}
        begin = [0 if row in on_path else index for row, index in enumerate(start)]
        first = min(0 if p in everyone_on_path else index for p, index in enumerate(every))
        if on_path:
            rows = torch.tensor(sorted(on_path), device=z0.device)
            z_t[rows] = noise[rows]
        z_t = self._at_own_states(z_t, noise, conditioning, starts, own, generator)
        path = z_t.clone()

        def keep(index: int, z: Tensor) -> None:
            for row in on_path:
                if start[row] == index:
                    path[row] = z[row]

        if not (everyone_on_path or self.settings.reads_solution(phase)):
            return Rollout(z_t, t, torch.zeros_like(z_t), z0, guidance, conditioning, unconditional, known, starts)
        waits = min(begin) - first if generator.lockstep else 0
        observe = keep if on_path else None
        with asked_by("solutions"):
            z_teacher = self.teacher_solution(z_t, conditioning, unconditional, guidance, begin, observe, waits)
        return Rollout(path, t, z_teacher, z0, guidance, conditioning, unconditional, known, starts)

    def _at_own_states(
        self,
        z_t: Tensor,
        noise: Tensor,
        conditioning: Conditioning,
        starts: Sequence[float],
        own: set[int],
        batch: SharedBatch,
    ) -> Tensor:
        """Return ``z_t`` with the student's own states in the samples at the positions ``own`` of the batch."""
        rows, part = batch.part([position in own for position in range(batch.total)])
        if not rows:
            return z_t
        index = torch.tensor(rows)
        theirs = [value for position, value in enumerate(starts) if position in own]
        states = self.student_states(noise[index], theirs, conditioning.rows(index), part)
        return z_t.index_copy(0, index.to(z_t.device), states) if part.weight else z_t

    @torch.no_grad()
    def student_states(
        self, noise: Tensor, starts: Sequence[float], conditioning: Conditioning, generator: Random
    ) -> Tensor:
        """Return the student's own states: its first steps from ``noise`` (B, C, H, W).

        Args:
            starts: where the states are wanted, timesteps of all samples that processes share.
        """

        def predict(z: Tensor, at: Tensor, rows: Tensor) -> Tensor:
            return self.student_z0(z, at, conditioning.rows(rows))

        process, states = self.denoiser.process, self.settings.states
        paths = draw_paths(process, starts, states.steps, generator_of(generator))
        with asked_by("own states"), self.denoiser.role("student"):
            return simulate(predict, process, noise, paths, states.stochasticity, generator)

    @torch.no_grad()
    def teacher_solution(
        self,
        z_t: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
        guidance: Tensor,
        start: Sequence[int] | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
        waits: int = 0,
    ) -> Tensor:
        """Return the guided teacher's solution at t = 0 from each sample's own grid index (default: pure noise).

        Args:
            observe: see :func:`~.solvers.solve`.
            waits: calls of the network, without effect, before the first sample starts: other processes, with which
                this one shares the network's weights, have samples that start earlier.
        """

        settings, process = self.settings, self.denoiser.process
        grid = iter(self.timesteps if start is None else self.timesteps[min(start) :])  # one prediction at each

        def guided(z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            conditions, without = conditioning.rows(rows), unconditional.rows(rows)
            everyone: list[int] | None = None if is_guided(settings, process, next(grid)) else []
            return guided_z0(self.denoiser, z, t, conditions, without, guidance[rows], everyone)

        with self.denoiser.role("teacher"):
            alone = torch.zeros(1, dtype=torch.long, device=z_t.device)
            for _ in range(waits):
                predict_z0(self.denoiser, z_t[alone], z_t.new_full((1,), self.timesteps[0]), conditioning.rows(alone))
            return solve(
                guided, self.denoiser.process, z_t, self.timesteps, start, solver=self.settings.solver, observe=observe
            )

    def trajectory(
        self, z0: Tensor, conditioning: Conditioning, unconditional: Conditioning, generator: Random
    ) -> Trajectory:
        """Solve from pure noise and keep the states that training can start from.

        Every state on the path has the same solution, so one recorded path serves all four modes: less work for small
        budgets. The states come from the teacher's own path instead of noised data; both have the teacher's marginals.
        """
        kept = self.recorded_indices()
        states: list[Tensor] = []

        def keep(index: int, z: Tensor) -> None:
            if index in kept:
                states.append(z.clone())

        guidance = self._draw_guidance(len(z0), generator).to(z0.device)
        noise = normal(z0, generator)
        with asked_by("trajectories"):
            z_teacher = self.teacher_solution(noise, conditioning, unconditional, guidance, observe=keep)
        return Trajectory(kept, torch.stack(states), z_teacher, z0, guidance, conditioning, unconditional)

    def recorded_indices(self) -> tuple[int, ...]:
        """Return the indices of the teacher's grid whose states :meth:`trajectory` keeps, ascending."""
        modes = len(PUBLISHED_PHASES[0].modes)
        reachable = timestep_mixture(self.settings.teacher_steps, [1.0] * modes) > RECORDED_PROBABILITY
        return tuple(int(index) for index in reachable.nonzero())

    def replay(self, trajectory: Trajectory, phase: Phase, generator: Random) -> Rollout:
        """Return a rollout from a recorded trajectory; each sample starts at an index drawn for this phase.

        Samples that start at the student's own state begin with the recorded noise, and the teacher solves them anew.
        """
        batch = len(trajectory.z_teacher)
        generator = shared(generator, batch)
        every = self.draw_indices(phase, trajectory.indices, batch, generator)
        drawn = [every[position] for position in generator.own]
        starts = self._starts_at(every)
        known = tuple(starts[position] for position in generator.own)
        position = torch.tensor([trajectory.indices.index(index) for index in drawn], device=trajectory.states.device)
        rollout = Rollout(
            trajectory.states[position, torch.arange(batch, device=position.device)],
            torch.tensor(known).to(position.device),
            trajectory.z_teacher,
            trajectory.z0,
            trajectory.guidance,
            trajectory.conditioning,
            trajectory.unconditional,
            known,
            starts,
        )
        _, own = self._draw_states(every, generator)
        z_t = self._at_own_states(rollout.z_t, trajectory.states[0], rollout.conditioning, starts, own, generator)
        rows = [row for row, position in enumerate(generator.own) if position in own]
        if not rows:
            return rollout
        if not self.settings.reads_solution(phase):
            return replace(rollout, z_t=z_t)
        index = torch.tensor(rows)
        part, z_teacher = rollout.rows(index), rollout.z_teacher.clone()
        begin = [drawn[row] for row in rows]
        with asked_by("solutions"):
            z_teacher[index] = self.teacher_solution(
                z_t[index], part.conditioning, part.unconditional, part.guidance, begin
            )
        return replace(rollout, z_t=z_t, z_teacher=z_teacher)

    # -- the student's output ------------------------------------------------------------------------------------

    def student_output(self, rollout: Rollout) -> Tensor:
        """Return the student's outputs (B, C, H, W) at the starts, in the current role."""
        return self.student_z0(rollout.z_t, rollout.t, rollout.conditioning)

    def student_z0(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``c_skip z_t + c_out z0_hat(z_t, t, c)`` (B, C, H, W), in the current role."""
        z0_hat = predict_z0(self.denoiser, z_t, t, conditioning)
        c_skip, c_out = (broadcast(value, z0_hat) for value in self.denoiser.process.boundary_scaling(t))
        return c_skip * z_t + c_out * z0_hat

    # -- draws ---------------------------------------------------------------------------------------------------

    def _starts(self) -> Sequence[int]:
        """Return the indices of the grid at which samples may start; DMD along a run starts at the run's timesteps."""
        count = self.settings.teacher_steps
        if self.settings.dmd.form != "trajectory":
            return range(count)
        steps = max(self.settings.states.steps)
        return [index * count // steps for index in range(steps)]

    def _starts_at(self, indices: Sequence[int]) -> tuple[float, ...]:
        """Return the grid's timesteps at ``indices``, rounded as a batch's ``t`` is."""
        return tuple(torch.tensor([self.timesteps[index] for index in indices]).tolist())

    def draw_indices(self, phase: Phase, allowed: Sequence[int], batch: int, generator: Random) -> list[int]:
        """Return where each sample that processes share starts: indices of the teacher's grid, out of ``allowed``."""
        probability = timestep_mixture(self.settings.teacher_steps, phase.modes)[list(allowed)]
        source, total = generator_of(generator), shared(generator, batch).total
        drawn = torch.multinomial(probability.to(source.device), total, replacement=True, generator=source).tolist()
        return [allowed[index] for index in drawn]

    def coming_calls(self, phase: Phase, generator: Random) -> list[int]:
        """Return how often the teacher will be asked for each sample of the next :meth:`rollout`, of all processes.

        The generator stays as it is.
        """
        source = generator_of(generator)
        before = source.get_state()
        starts = self.draw_indices(phase, self._starts(), shared(generator, 1).total, generator)
        source.set_state(before)
        return [self.settings.teacher_steps - start for start in starts]

    def _draw_states(self, start: Sequence[int], generator: Random) -> tuple[set[int], set[int]]:
        """Return the samples that start on the teacher's path, and those that start at the student's own state.

        Args:
            start: of all samples that processes share.
        """
        states = self.settings.states
        if states.trajectory == states.student == 0:
            return set(), set()
        drawn = uniform(len(start), generator_of(generator)).tolist()
        moving = [(row, share) for row, share in enumerate(drawn) if start[row] > 0]
        own = {row for row, share in moving if share < states.student}
        return {row for row, share in moving if share < states.student + states.trajectory} - own, own

    def _draw_guidance(self, batch: int, generator: Random) -> Tensor:
        low, high = self.settings.guidance
        return low + (high - low) * uniform(batch, generator)
