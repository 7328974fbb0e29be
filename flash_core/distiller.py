"""One training step of Flash Diffusion over any :class:`~.denoiser.Denoiser` (arXiv 2406.02347, section 4).

The caller owns optimisers, devices, precision and the loop. One step: draw a :class:`Rollout` (expensive: the teacher
solves an ODE); :meth:`Distiller.student_step` leaves gradients in the student's adapter; then
:meth:`Distiller.discriminator_step` and :meth:`Distiller.critic_step` leave their gradients from the SAME rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import losses
from .denoiser import Conditioning, Denoiser, guided_z0, predict_z0
from .discriminator import Discriminator
from .grid import timestep_mixture, trailing_timesteps
from .process import broadcast
from .rollout import Rollout, Trajectory
from .settings import (
    ADVERSARIAL_TIMESTEPS,
    PUBLISHED_PHASES,
    DistillationLoss,
    DistillerSettings,
    DmdSettings,
    Phase,
    Rows,
)
from .solvers import solve
from .terms import adversarial, distribution_matching
from .terms.draws import acting_rows, normal

__all__ = [
    "ADVERSARIAL_TIMESTEPS",
    "PUBLISHED_PHASES",
    "DistillationLoss",
    "Distiller",
    "DistillerSettings",
    "DmdSettings",
    "Phase",
    "Rollout",
    "StudentStep",
    "Trajectory",
]

# Indices of the teacher's grid less likely than this are not kept when a trajectory is recorded.
RECORDED_PROBABILITY = 1e-3


@dataclass(frozen=True)
class StudentStep:
    """The result of :meth:`Distiller.student_step`.

    Attributes:
        z_student: (B, C, H, W) the student's outputs, detached.
        terms: the unweighted loss terms that were computed, and ``total``, as detached scalars on the device.
    """

    z_student: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Distiller:
    """Flash Diffusion on one backbone.

    Args:
        denoiser: the backbone, its roles on one frozen base.
        settings: the method's constants.
        discriminator: needed if a phase has an adversarial weight above 0.
        decode: latents -> images in [-1, 1], differentiable; needed by ``lpips``.
        perceptual: ``(images, images) -> (B,)``; needed by ``lpips``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: DistillerSettings | None = None,
        *,
        discriminator: Discriminator | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings or DistillerSettings()
        self.discriminator = discriminator
        self.decode = decode
        self.perceptual = perceptual
        self.timesteps = trailing_timesteps(denoiser.process, self.settings.teacher_steps)
        if self.settings.distillation == "lpips" and (decode is None or perceptual is None):
            raise ValueError("distillation 'lpips' compares decoded images: pass decode= and perceptual=")

    # -- the rollout ---------------------------------------------------------------------------------------------

    def rollout(
        self,
        z0: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
        phase: Phase,
        generator: torch.Generator,
    ) -> Rollout:
        """Draw timesteps, noise and guidance for a batch of data latents, and let the teacher solve each sample.

        Args:
            z0: (B, C, H, W) data latents.
            generator: the only source of randomness.
        """
        start = self._draw_indices(phase, range(self.settings.teacher_steps), len(z0), generator)
        t = torch.tensor([self.timesteps[index] for index in start], device=z0.device)
        noise = normal(z0, generator)
        pure = torch.tensor([index == 0 for index in start], device=z0.device)
        z_t = torch.where(broadcast(pure, z0), noise, self.denoiser.process.add_noise(z0, noise, t))
        guidance = self._draw_guidance(len(z0), generator).to(z0.device)
        z_teacher = self.teacher_solution(z_t, conditioning, unconditional, guidance, start)
        return Rollout(z_t, t, z_teacher, z0, guidance, conditioning, unconditional)

    @torch.no_grad()
    def teacher_solution(
        self,
        z_t: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning,
        guidance: Tensor,
        start: Sequence[int] | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the guided teacher's solution at t = 0 from each sample's own grid index (default: pure noise)."""

        def guided(z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return guided_z0(self.denoiser, z, t, conditioning.rows(rows), unconditional.rows(rows), guidance[rows])

        with self.denoiser.role("teacher"):
            return solve(
                guided, self.denoiser.process, z_t, self.timesteps, start, solver=self.settings.solver, observe=observe
            )

    def trajectory(
        self, z0: Tensor, conditioning: Conditioning, unconditional: Conditioning, generator: torch.Generator
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
        z_teacher = self.teacher_solution(noise, conditioning, unconditional, guidance, observe=keep)
        return Trajectory(kept, torch.stack(states), z_teacher, z0, guidance, conditioning, unconditional)

    def recorded_indices(self) -> tuple[int, ...]:
        """Return the indices of the teacher's grid whose states :meth:`trajectory` keeps, ascending."""
        modes = len(PUBLISHED_PHASES[0].modes)
        reachable = timestep_mixture(self.settings.teacher_steps, [1.0] * modes) > RECORDED_PROBABILITY
        return tuple(int(index) for index in reachable.nonzero())

    def replay(self, trajectory: Trajectory, phase: Phase, generator: torch.Generator) -> Rollout:
        """Return a rollout from a recorded trajectory; each sample starts at an index drawn for this phase."""
        batch = len(trajectory.z_teacher)
        drawn = self._draw_indices(phase, trajectory.indices, batch, generator)
        position = torch.tensor([trajectory.indices.index(index) for index in drawn], device=trajectory.states.device)
        return Rollout(
            trajectory.states[position, torch.arange(batch, device=position.device)],
            torch.tensor([self.timesteps[index] for index in drawn], device=position.device),
            trajectory.z_teacher,
            trajectory.z0,
            trajectory.guidance,
            trajectory.conditioning,
            trajectory.unconditional,
        )

    # -- the three updates ---------------------------------------------------------------------------------------

    def student_step(
        self, rollout: Rollout, phase: Phase, generator: torch.Generator, scale: float = 1.0
    ) -> StudentStep:
        """Compute the student's loss and leave ``scale`` times its gradient in the student's adapter.

        The backward pass is split. First the loss terms run on a detached leaf of the student's output, while roles
        change. Then the leaf's gradient goes through the student's graph with the student's adapter on. So gradient
        checkpointing recomputes each activation in the role that made the activation.

        A term that acts on some samples only is the mean over these samples. It is not computed where there are none.
        """
        with self.denoiser.role("student"):
            z_student = self.student_output(rollout)
        leaf = z_student.detach().requires_grad_()
        terms: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        gradient = torch.zeros_like(leaf)
        weight = self._distillation_weight(rollout, phase)
        computed: tuple[tuple[str, float, Rows, Callable[[Tensor, Rollout], Tensor]], ...] = (
            ("distillation", phase.distillation, "all", lambda z, part: self._distillation(z, part, weight, generator)),
            (
                "adversarial",
                phase.adversarial,
                self.settings.adversarial_rows,
                lambda z, part: self._adversarial(z, part, generator),
            ),
            ("dmd", phase.dmd, self.settings.dmd.rows, lambda z, part: self._dmd(z, part, generator)),
        )
        for name, factor, rows, compute in computed:
            index = acting_rows(rows, self.denoiser.process, rollout.t) if factor else None
            if factor == 0 or (index is not None and len(index) == 0):
                continue
            # One backward pass a term: only one term's graph through the teacher is alive at a time.
            with self.denoiser.role("teacher"):
                term = compute(*((leaf, rollout) if index is None else (leaf[index], rollout.rows(index))))
                slope = torch.autograd.grad(term, leaf)[0]
            share: float | Tensor = factor
            if name == "adversarial" and self.settings.adversarial_weighting == "gradient_norm":
                share = factor * _norm_ratio(gradient, slope, index)
                terms["adversarial_weight"] = torch.as_tensor(share)
            gradient += slope * share
            terms[name] = term.detach()
            weighted.append(share * terms[name])
        terms["total"] = torch.stack(weighted).sum() if weighted else torch.zeros((), device=leaf.device)
        with self.denoiser.role("student"):
            torch.autograd.backward(z_student, gradient * scale)
        return StudentStep(leaf.detach(), terms)

    def student_output(self, rollout: Rollout) -> Tensor:
        """Return ``c_skip z_t + c_out z0_hat(z_t, t, c)`` (B, C, H, W), in the current role."""
        z0_hat = predict_z0(self.denoiser, rollout.z_t, rollout.t, rollout.conditioning)
        c_skip, c_out = (broadcast(value, z0_hat) for value in self.denoiser.process.boundary_scaling(rollout.t))
        return c_skip * rollout.z_t + c_out * z0_hat

    def discriminator_step(
        self, rollout: Rollout, z_student: Tensor, generator: torch.Generator, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Leave ``scale`` times the gradient of the discriminator's loss in its heads; ``z_student`` is detached.

        Returns:
            The loss, ``discriminator_accuracy`` (the share of pairs that the heads tell apart, 0.5 is chance) and the
            gradient penalty; nothing where no sample is one that the term acts on.
        """
        discriminator = self._require_discriminator()
        index = acting_rows(self.settings.adversarial_rows, self.denoiser.process, rollout.t)
        if index is not None:
            rollout, z_student = rollout.rows(index), z_student[index]
        if not len(z_student):
            return {}
        loss, shown = adversarial.discriminator_term(
            self.denoiser, discriminator, self.settings, z_student, rollout, generator
        )
        torch.autograd.backward(loss * scale)
        return shown

    def critic_samples(self, rollout: Rollout, z_student: Tensor) -> tuple[Tensor, Conditioning]:
        """Return the outputs (b, C, H, W) on which DMD acts, with their conditions: the critic learns from them."""
        index = acting_rows(self.settings.dmd.rows, self.denoiser.process, rollout.t)
        return (
            (z_student, rollout.conditioning) if index is None else (z_student[index], rollout.conditioning.rows(index))
        )

    def critic_step(
        self, z_student: Tensor, conditioning: Conditioning, generator: torch.Generator, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Leave ``scale`` times the gradient of the diffusion loss on the student's samples in the critic's adapter."""
        with self.denoiser.role("critic"):
            loss = distribution_matching.critic_loss(self.denoiser, z_student, conditioning, generator)
            torch.autograd.backward(loss * scale)
        return {"critic": loss.detach()}

    # -- the student's terms -------------------------------------------------------------------------------------

    def _distillation_weight(self, rollout: Rollout, phase: Phase) -> Tensor | None:
        """Return the factor of each sample's distillation loss (B,), None where all are 1."""
        dmd = self.settings.dmd
        if phase.dmd == 0 or dmd.distillation == 1:
            return None
        index = acting_rows(dmd.rows, self.denoiser.process, rollout.t)
        weight = torch.ones(len(rollout.t), device=rollout.t.device)
        weight[slice(None) if index is None else index] = dmd.distillation
        return weight

    def _distillation(
        self, z_student: Tensor, rollout: Rollout, weight: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        kind = self.settings.distillation
        if kind != "lpips":
            return losses.latent_loss(kind, z_student, rollout.z_teacher, weight)
        assert self.decode is not None  # both were checked when the distiller was made
        assert self.perceptual is not None
        crop = self.settings.perceptual_crop
        return losses.perceptual_loss(
            self.perceptual, self.decode, z_student, rollout.z_teacher, crop, generator, weight
        )

    def _adversarial(self, z_student: Tensor, rollout: Rollout, generator: torch.Generator) -> Tensor:
        discriminator = self._require_discriminator()
        return adversarial.generator_term(self.denoiser, discriminator, self.settings, z_student, rollout, generator)

    def _dmd(self, z_student: Tensor, rollout: Rollout, generator: torch.Generator) -> Tensor:
        real, fake = distribution_matching.real_and_fake(self.denoiser, self.settings, z_student, rollout, generator)
        return losses.distribution_matching_loss(z_student, real, fake)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _require_discriminator(self) -> Discriminator:
        if self.discriminator is None:
            raise ValueError(
                "this phase weighs the adversarial term, but the distiller has no discriminator: "
                "pass discriminator= or set the phase's adversarial weight to 0"
            )
        return self.discriminator

    def _draw_indices(self, phase: Phase, allowed: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
        probability = timestep_mixture(self.settings.teacher_steps, phase.modes)[list(allowed)]
        drawn = torch.multinomial(
            probability.to(generator.device), batch, replacement=True, generator=generator
        ).tolist()
        return [allowed[index] for index in drawn]

    def _draw_guidance(self, batch: int, generator: torch.Generator) -> Tensor:
        low, high = self.settings.guidance
        return low + (high - low) * torch.rand(batch, generator=generator, device=generator.device)


def _norm_ratio(wanted: Tensor, given: Tensor, index: Tensor | None) -> Tensor:
    """Return ``|wanted| / |given|`` over the samples at ``index``, 0 where ``given`` is 0."""
    if index is not None:
        wanted, given = wanted[index], given[index]
    norm = given.norm()
    return torch.where(norm > 0, wanted.norm() / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
