"""Distillation with all its losses, for any denoiser: the same code runs in ComfyUI's process and in the test's.

The package has another name in each process, so the name is an argument.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Modes at t = 999, 749, 499, 249 alike, and every term weighs.
MODES, ADVERSARIAL, DMD = (0.25,) * 4, 0.2, 0.5
TERMS = ("distillation", "adversarial", "dmd", "total", "discriminator", "critic")


class Updates:
    """The trainer's three updates (student, discriminator, critic) on one batch of latents.

    Args:
        package: this package's name in the process.
        denoiser: with an adapter for ``student`` and for ``critic``.
        discriminator: the weights of a discriminator for the denoiser's features.
        channels: of those features.
    """

    def __init__(
        self,
        package: str,
        denoiser: Any,
        discriminator: Mapping[str, Tensor],
        channels: Sequence[int],
        *,
        teacher_steps: int,
        solver: str,
        learning_rate: float,
        hidden: int = 16,
    ) -> None:
        core = importlib.import_module(f"{package}.flash_core.distiller")
        heads = importlib.import_module(f"{package}.flash_core.discriminator").Discriminator(channels, hidden)
        heads.load_state_dict(discriminator)
        settings = core.DistillerSettings(
            teacher_steps=teacher_steps, solver=solver, guidance=(2.0, 4.0), fake_score="critic"
        )
        self.phase = core.Phase(modes=MODES, adversarial=ADVERSARIAL, dmd=DMD)
        self.distiller = core.Distiller(denoiser, settings, discriminator=heads)
        # Adam divides by the gradient's size, and makes steps of what is mere rounding where that is nearly 0.
        adam = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
        self.optimizers = {
            "student": torch.optim.AdamW(denoiser.adapter_parameters("student").values(), learning_rate, **adam),
            "critic": torch.optim.AdamW(denoiser.adapter_parameters("critic").values(), learning_rate, **adam),
            "discriminator": torch.optim.AdamW(heads.parameters(), learning_rate / 4, **adam),
        }

    def rollout(self, z0: Tensor, conditions: Any, unconditional: Any, seed: int) -> Any:
        """A batch with the teacher's solutions."""
        return self.distiller.rollout(z0, conditions, unconditional, self.phase, torch.Generator().manual_seed(seed))

    def update(self, rollout: Any, seed: int) -> dict[str, float]:
        """Make one step of each optimiser on a rollout, and return every loss term."""
        generator = torch.Generator().manual_seed(seed)
        step = self.distiller.student_step(rollout, self.phase, generator)
        self._step("student")
        terms = dict(step.terms)
        terms |= self.distiller.discriminator_step(rollout, step.z_student, generator)
        self._step("discriminator")
        terms |= self.distiller.critic_step(step.z_student, rollout.conditioning, generator)
        self._step("critic")
        return {name: float(terms[name]) for name in TERMS}

    @torch.no_grad()
    def error(self, rollout: Any) -> float:
        """Return the student's mean squared distance to the teacher's solutions."""
        with self.distiller.denoiser.role("student"):
            return float((self.distiller.student_output(rollout) - rollout.z_teacher).square().mean())

    def _step(self, name: str) -> None:
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()
