"""One preset: the timesteps, the noise between them, the guidance and the strength that a LoRA was made for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

import torch

from ..grid import trailing_timesteps
from ..process import FlowProcess, Process, ProcessKind

# diffusers' schedulers: LCMScheduler, DDIMScheduler, EulerDiscreteScheduler, TCDScheduler,
# FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler.
Scheduler: TypeAlias = Literal["LCM", "DDIM", "Euler", "TCD", "flow Euler", "flow DPM-Solver++"]
# The trailing timesteps; those that diffusers' scheduler takes where a pipeline is given a step count alone; or those
# of DPMSolverMultistepScheduler for flow models, .1 % before the trailing ones.
Timesteps: TypeAlias = Literal["trailing", "reference", "solver"]
SOLVER_START = 0.999  # of the fraction of the schedule: the scheduler leaves out the last of 1000 timesteps


@dataclass(frozen=True)
class Preset:
    """How one kind of published few-step LoRA is sampled.

    Attributes:
        key: identifies the preset.
        title: the name for users, also the choice in a workflow: never change one.
        families: keys of :data:`~..families.FAMILIES` that its LoRAs exist for.
        scheduler: how a run goes from one noise level to the next.
        timesteps: which timesteps are evaluated.
        steps: the step counts that the source names, ascending.
        source: address of the facts.
        guidance: the lowest and the highest scale of classifier-free guidance; 1 is no guidance.
        guidance_at: the same for single step counts, where the source names them.
        distilled_guidance: the guidance that the model reads as an input (Flux), or None.
        strength: of the LoRA.
        gamma: of TCD (diffusers' ``eta``): 0 is deterministic, 1 adds the most noise.
        shift: of a flow model's schedule; None for the model's own.
        names: patterns of file names, as :func:`~.naming.plain_name` spells them. The group ``steps`` is the step count
            that a file is made for. A group with the key of a family is for LoRAs of that family alone.
        note: one more sentence for users.
    """

    key: str
    title: str
    families: tuple[str, ...]
    scheduler: Scheduler
    timesteps: Timesteps
    steps: tuple[int, ...]
    source: str
    guidance: tuple[float, float] = (1.0, 1.0)
    guidance_at: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    distilled_guidance: float | None = None
    strength: float = 1.0
    gamma: float = 0.0
    shift: float | None = None
    names: tuple[re.Pattern[str], ...] = ()
    note: str = ""

    @property
    def kind(self) -> ProcessKind:
        """The kind of process that the preset's models have."""
        return "flow" if self.scheduler.startswith("flow") else "vp"

    @property
    def second_order(self) -> bool:
        """Whether a step reads the last two predictions; see :func:`~..sampler.few_step_sample`."""
        return self.scheduler == "flow DPM-Solver++"

    def process(self, process: Process) -> Process:
        """Return the model's process, with the preset's shift where it has one."""
        return process if self.shift is None else FlowProcess(self.shift)

    def grid(self, process: Process, steps: int) -> list[float]:
        """Return the timesteps of a full run, from noise on.

        Args:
            process: the model's; for a preset with a shift the shift's takes its place.
        """
        process = self.process(process)
        if self.timesteps == "solver":
            return [process.timestep(SOLVER_START * (1 - index / steps)) for index in range(steps)]
        return (
            process.reference_timesteps(steps) if self.timesteps == "reference" else trailing_timesteps(process, steps)
        )

    def stochasticity(self, process: Process, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Return the share of fresh noise between each two of a run's N timesteps: N - 1 numbers in 0..1.

        LCM adds fresh noise alone, the others but TCD none. TCD goes without noise to ``s = floor((1 - gamma) t)``, and
        adds noise from there to ``t``, the next timestep (arXiv 2402.19159, algorithm 4). Of the noise at ``t``, the
        part ``sqrt(1 - alpha_t^2 / alpha_s^2)`` is fresh; its share is this part over ``sigma_t``.
        """
        if self.scheduler == "LCM":
            return (1.0,) * (len(timesteps) - 1)
        if self.scheduler != "TCD":
            return (0.0,) * (len(timesteps) - 1)
        return tuple(self._tcd_share(process, following) for _, following in pairwise(timesteps))

    def _tcd_share(self, process: Process, t: float) -> float:
        reached = math.floor((1 - self.gamma) * t)
        alphas, sigmas = process.alpha_sigma(torch.tensor([reached, t], dtype=torch.float64))
        between, at = alphas.double(), float(sigmas[1])
        return min(float((1 - (between[1] / between[0]) ** 2).clamp(min=0).sqrt()) / at, 1.0)

    @property
    def starts_at_sigma(self) -> bool:
        """True if the first latents are ``sigma noise`` in k-diffusion's units, not ``sqrt(1 + sigma^2) noise``.

        diffusers' EulerDiscreteScheduler starts so with trailing timesteps: .2 % less noise with SDXL.
        """
        return self.scheduler == "Euler"

    def end(self, process: Process) -> tuple[float, float] | None:
        """Return ``(alpha, sigma)`` of the level at which a run ends, or None for the clean prediction.

        diffusers' DDIM and TCD end at timestep 0, where 3 % of the noise is left with Stable Diffusion's schedule:
        DDIM because these models set ``set_alpha_to_one`` to False, TCD always.
        """
        if self.scheduler not in ("DDIM", "TCD"):
            return None
        alpha, sigma = process.alpha_sigma(torch.zeros(1))
        return float(alpha), float(sigma)

    def guidance_for(self, steps: int) -> tuple[float, float]:
        """Return the lowest and the highest guidance scale for a step count."""
        return self.guidance_at.get(steps, self.guidance)

    @property
    def noise_in_words(self) -> str:
        """What happens between two steps."""
        if self.scheduler == "TCD":
            return f"TCD, gamma {self.gamma:g}"
        return {
            "LCM": "LCM, fresh noise",
            "DDIM": "DDIM, no fresh noise",
            "Euler": "Euler, no fresh noise",
            "flow Euler": "Euler, no fresh noise",
            "flow DPM-Solver++": "DPM-Solver++ of second order, no fresh noise",
        }[self.scheduler]


def in_words(bounds: tuple[float, float]) -> str:
    """``1``, or ``5 to 8``."""
    low, high = bounds
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
