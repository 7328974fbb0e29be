"""One training step of Flash Diffusion over any :class:`~.denoiser.Denoiser` (arXiv 2406.02347, section 4).

The caller owns optimisers, devices, precision and the loop. One step: draw a :class:`Rollout` (expensive: the teacher
solves an ODE); :meth:`Distiller.student_step` leaves gradients in the student's adapter; then
:meth:`Distiller.discriminator_step` and :meth:`Distiller.critic_step` leave their gradients from the SAME rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import losses
from .denoiser import Conditioning, Denoiser
from .discriminator import Discriminator
from .passes.asking import asked_by
from .rollout import Rollout, RolloutSource, Trajectory
from .settings import (
    ADVERSARIAL_TIMESTEPS,
    PUBLISHED_PHASES,
    DistillationLoss,
    DistillerSettings,
    DmdSettings,
    Phase,
    Rows,
    StartStates,
)
from .terms import adversarial, distribution_matching
from .terms.draws import acting_rows, acts_on
from .terms.drift import output_figures
from .terms.features import feature_matching_term
from .terms.segments import intra_segment_term
from .terms.shared_batch import Random, SharedBatch, shared

__all__ = [
    "ADVERSARIAL_TIMESTEPS",
    "PUBLISHED_PHASES",
    "DistillationLoss",
    "Distiller",
    "DistillerSettings",
    "DmdSettings",
    "Phase",
    "Rollout",
    "StartStates",
    "StudentStep",
    "Trajectory",
]


@dataclass(frozen=True)
class StudentStep:
    """The result of :meth:`Distiller.student_step`.

    Attributes:
        z_student: (B, C, H, W) the student's outputs, detached.
        terms: the unweighted loss terms that were computed, and ``total``, as detached scalars on the device.
        seen: the teacher's hidden states of the adversarial loss, for :meth:`Distiller.discriminator_step`; None
            without that loss.
        figures: detached scalars on the device for a run's health: ``pull_TERM``, the norm of each term's weighted
            gradient at the student's outputs, and those of :func:`~.terms.drift.output_figures` where the teacher's
            solutions are there to compare with.
    """

    z_student: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    seen: adversarial.Seen | None = None
    figures: dict[str, Tensor] = field(default_factory=dict)


class Distiller(RolloutSource):
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
        super().__init__(denoiser, settings or DistillerSettings())
        self.discriminator = discriminator
        self.decode = decode
        self.perceptual = perceptual
        if self.settings.distillation == "lpips" and (decode is None or perceptual is None):
            raise ValueError("distillation 'lpips' compares decoded images: pass decode= and perceptual=")

    # -- the three updates ---------------------------------------------------------------------------------------

    def student_step(self, rollout: Rollout, phase: Phase, generator: Random, scale: float = 1.0) -> StudentStep:
        """Compute the student's loss and leave ``scale`` times its gradient in the student's adapter.

        The backward pass is split. First the loss terms run on a detached leaf of the student's output, while roles
        change. Then the leaf's gradient goes through the student's graph with the student's adapter on. So gradient
        checkpointing recomputes each activation in the role that made the activation.

        A term that acts on some samples only is the mean over these samples. It is not computed where there are none.
        Where processes share a batch, ``terms`` are such that their mean over the processes is the whole batch's.
        """
        with asked_by("student"), self.denoiser.role("student"):
            z_student = self.student_output(rollout)
        leaf = z_student.detach().requires_grad_()
        terms: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        gradient = torch.zeros_like(leaf)
        weight = self._distillation_weight(rollout, phase)
        seen: list[adversarial.Seen] = []
        batch = shared(generator, len(leaf))
        computed: tuple[tuple[str, float, Rows, Callable[[Tensor, Rollout, SharedBatch], Tensor]], ...] = (
            ("distillation", phase.distillation, "all", lambda z, part, of: self._distillation(z, part, weight, of)),
            (
                "adversarial",
                phase.adversarial,
                self.settings.adversarial_rows,
                lambda z, part, of: self._adversarial(z, part, of, seen),
            ),
            ("dmd", phase.dmd, self.settings.dmd.rows, lambda z, part, of: self._dmd(z, part, of)),
            (
                "feature_matching",
                phase.feature_matching,
                self.settings.feature_rows,
                lambda z, part, of: feature_matching_term(self.denoiser, self.settings, z, part, of),
            ),
            (
                "intra_segment",
                phase.intra_segment,
                "all",
                lambda z, part, of: intra_segment_term(self, z, part, max(self.settings.states.steps), of),
            ),
        )
        for name, factor, rows, compute in computed:
            index, of = self._acting(rows, rollout, batch) if factor else (None, batch)
            if factor == 0 or (index is not None and len(index) == 0):
                continue
            # One backward pass a term: only one term's graph through the teacher is alive at a time.
            with asked_by(name.replace("_", " ")), self.denoiser.role("teacher"):
                term = compute(*((leaf, rollout) if index is None else (leaf[index], rollout.rows(index))), of)
                slope = of.weighted(torch.autograd.grad(term, leaf)[0])
            share: float | Tensor = factor
            if name == "adversarial" and self.settings.adversarial_weighting == "gradient_norm":
                share = factor * _norm_ratio(gradient, slope, index, of)
                terms["adversarial_weight"] = torch.as_tensor(share)
            pull = slope * share
            gradient += pull
            figures[f"pull_{name}"] = pull.norm()
            terms[name] = of.weighted(term.detach())
            weighted.append(share * terms[name])
        terms["total"] = torch.stack(weighted).sum() if weighted else torch.zeros((), device=leaf.device)
        with self.denoiser.role("student"):
            torch.autograd.backward(z_student, gradient * scale)
        z_student = leaf.detach()
        if self.settings.reads_solution(phase):
            figures |= output_figures(self.denoiser.process, rollout.t, z_student, rollout.z_teacher)
        return StudentStep(z_student, terms, seen[0] if seen else None, figures)

    def discriminator_step(
        self,
        rollout: Rollout,
        z_student: Tensor,
        generator: Random,
        scale: float = 1.0,
        seen: adversarial.Seen | None = None,
    ) -> dict[str, Tensor]:
        """Leave ``scale`` times the gradient of the discriminator's loss in its heads; ``z_student`` is detached.

        Args:
            seen: of the student's step on this rollout: its hidden states are used again, at its noise levels. None
                draws noise anew, for the teacher's passes on real and fake samples.

        Returns:
            The loss, ``discriminator_accuracy`` (the share of pairs that the heads tell apart, 0.5 is chance),
            ``discriminator_real`` and ``discriminator_fake`` (D(real) and D(fake), the mean logits) and the gradient
            penalty; nothing where no sample is one that the term acts on.
        """
        discriminator = self._require_discriminator()
        index, batch = self._acting(self.settings.adversarial_rows, rollout, shared(generator, len(z_student)))
        if index is not None:
            rollout, z_student = rollout.rows(index), z_student[index]
        if not len(z_student):
            return {}
        with asked_by("discriminator"):
            loss, shown = adversarial.discriminator_term(
                self.denoiser, discriminator, self.settings, z_student, rollout, batch, seen
            )
        torch.autograd.backward(batch.weighted(loss) * scale)
        return {name: batch.weighted(value) for name, value in shown.items()}

    def critic_samples(
        self, rollout: Rollout, z_student: Tensor, generator: Random
    ) -> tuple[Tensor, Rollout, SharedBatch]:
        """Return the outputs (b, C, H, W) on which DMD acts, with their rollouts: the critic learns from them.

        The third value is the batch of these samples, from which :meth:`critic_step` draws.
        """
        index, batch = self._acting(self.settings.dmd.rows, rollout, shared(generator, len(z_student)))
        return (z_student, rollout, batch) if index is None else (z_student[index], rollout.rows(index), batch)

    def critic_step(
        self,
        z_student: Tensor,
        conditioning: Conditioning,
        generator: Random,
        scale: float = 1.0,
        rollout: Rollout | None = None,
    ) -> dict[str, Tensor]:
        """Leave ``scale`` times the gradient of the diffusion loss on the student's samples in the critic's adapter.

        Args:
            rollout: of the samples; needed by the form ``trajectory`` of DMD.
        """
        batch = shared(generator, len(z_student))
        with asked_by("critic"), self.denoiser.role("critic"):
            loss = batch.weighted(
                distribution_matching.critic_loss(self.denoiser, self.settings, z_student, conditioning, batch, rollout)
            )
            torch.autograd.backward(loss * scale)
        return {"critic": loss.detach()}

    # -- the student's terms -------------------------------------------------------------------------------------

    def _distillation_weight(self, rollout: Rollout, phase: Phase) -> Tensor | None:
        """Return the factor of each sample's distillation loss (B,), None where all are 1."""
        kind, process, factor = (
            self.settings.distillation_weighting,
            self.denoiser.process,
            phase.first_step_distillation,
        )
        if kind == "uniform" and factor == 1:
            return None
        weight = torch.ones(len(rollout.t), device=rollout.t.device)
        if kind != "uniform":
            weight = losses.timestep_weight(kind, process, rollout.t)
        if factor != 1:
            index = acting_rows("first_step", process, rollout.starts)
            assert index is not None
            weight[index] *= factor
        return weight

    def _distillation(self, z_student: Tensor, rollout: Rollout, weight: Tensor | None, generator: Random) -> Tensor:
        kind = self.settings.distillation
        if kind != "lpips":
            return losses.latent_loss(kind, z_student, rollout.z_teacher, weight)
        assert self.decode is not None  # both were checked when the distiller was made
        assert self.perceptual is not None
        crop = self.settings.perceptual_crop
        return losses.perceptual_loss(
            self.perceptual, self.decode, z_student, rollout.z_teacher, crop, generator, weight
        )

    def _adversarial(
        self, z_student: Tensor, rollout: Rollout, generator: Random, seen: list[adversarial.Seen]
    ) -> Tensor:
        discriminator = self._require_discriminator()
        loss, shown = adversarial.generator_term(
            self.denoiser, discriminator, self.settings, z_student, rollout, generator
        )
        seen.append(shown)
        return loss

    def _dmd(self, z_student: Tensor, rollout: Rollout, generator: Random) -> Tensor:
        real, fake = distribution_matching.real_and_fake(self.denoiser, self.settings, z_student, rollout, generator)
        return losses.distribution_matching_loss(z_student, real, fake, self.settings.dmd.loss)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _acting(self, rows: Rows, rollout: Rollout, batch: SharedBatch) -> tuple[Tensor | None, SharedBatch]:
        """Return the indices (b,) of the samples on which a term acts, None for all, and their part of the batch.

        The indices are on the CPU, so that nothing waits for the device. They are empty where the term acts on no
        sample of any process.
        """
        if rows == "all":
            return None, batch
        index, part = batch.part(acts_on(rows, self.denoiser.process, rollout.all_starts()))
        return torch.tensor(index, dtype=torch.long), part

    def _require_discriminator(self) -> Discriminator:
        if self.discriminator is None:
            raise ValueError(
                "this phase weighs the adversarial term, but the distiller has no discriminator: "
                "pass discriminator= or set the phase's adversarial weight to 0"
            )
        return self.discriminator


def _norm_ratio(wanted: Tensor, given: Tensor, index: Tensor | None, batch: SharedBatch) -> Tensor:
    """Return ``|wanted| / |given|`` over the samples at ``index``, in all processes, 0 where ``given`` is 0."""
    if index is not None:
        wanted, given = wanted[index], given[index]
    norm = batch.norm(given)
    return torch.where(norm > 0, batch.norm(wanted) / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
