"""Pictures from a teacher or its student, each from its own seed: the same picture whatever the batch it is made in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...flash_core.denoiser import Conditioning, Denoiser
    from ...flash_core.process import Process
    from ...flash_core.solvers import Solver


class Generator(Protocol):
    """A text-to-image model as it is evaluated: a denoiser between a text encoder and a decoder."""

    @property
    def denoiser(self) -> Denoiser:
        """The backbone with its roles "teacher" and "student"."""
        ...

    @property
    def device(self) -> torch.device:
        """Where latents go."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The conditions of B prompts."""
        ...

    def unconditional(self, batch: int) -> Conditioning:
        """The condition that guidance leads away from, B times."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Run:
    """One way to make pictures: who, in how many steps, with how much guidance (1 is none)."""

    role: Literal["teacher", "student"]
    steps: int
    guidance: float = 1.0

    @property
    def name(self) -> str:
        """``teacher 4 steps, guided``; what tables and reports call it."""
        return f"{self.role} {self.steps} step{'s' * (self.steps > 1)}{', guided' * (self.guidance != 1)}"

    @property
    def label(self) -> str:
        """``teacher 25 steps, guidance 7.5``; where runs of several scales stand side by side."""
        return f"{self.role} {self.steps} step{'s' * (self.steps > 1)}" + (
            f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        )

    @property
    def nfe(self) -> int:
        """Forward passes of the network a picture: guidance asks it twice a step, in one batch or not."""
        return self.steps * (1 if self.guidance == 1 else 2)


def default_solver(process: Process) -> Solver:
    """Euler on a flow's straight paths, DPM-Solver++(2M) otherwise, as in training."""
    return "euler" if process.prediction == "flow" else "dpmpp_2m"


def noise_source(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Callable[[], Tensor]:
    """A source of noise (B, *shape), one generator a sample.

    Drawn on the CPU, so that a seed means the same noise on every device. The CPU's generator reads the low 32 bits of
    a seed only.
    """
    import torch

    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(*shape, generator=stream) for stream in streams]).to(device)


def sample_latents(
    generator: Generator, run: Run, prompts: Sequence[str], seeds: Sequence[int], solver: Solver | None = None
) -> Tensor:
    """Latents (B, C, h, w) of B prompts, from pure noise.

    The student takes the few-step sampler, fresh noise after each prediction; the teacher solves its ODE. Both begin
    at the same noise for the same seed.

    Args:
        solver: the teacher's; default :func:`default_solver`.
    """
    import torch

    from ...flash_core.denoiser import guided_z0, predict_z0
    from ...flash_core.grid import trailing_timesteps
    from ...flash_core.sampler import few_step_sample
    from ...flash_core.solvers import solve

    denoiser = generator.denoiser
    process = denoiser.process
    timesteps = trailing_timesteps(process, run.steps)
    noise = noise_source(seeds, generator.latent_shape, generator.device)
    conditioning = generator.encode_prompts(prompts)
    unconditional = None if run.guidance == 1 else generator.unconditional(len(prompts))

    def z0(z: Tensor, t: Tensor) -> Tensor:
        if unconditional is None:
            return predict_z0(denoiser, z, t, conditioning)
        guidance = torch.full((len(z),), run.guidance, device=z.device)
        return guided_z0(denoiser, z, t, conditioning, unconditional, guidance)

    with torch.inference_mode(), denoiser.role(run.role):
        if run.role == "teacher":
            # Everybody starts at the first step, so that the solver always asks for the whole batch.
            return solve(
                lambda z, t, _: z0(z, t), process, noise(), timesteps, solver=solver or default_solver(process)
            )
        alphas, sigmas = process.alpha_sigma(torch.tensor(timesteps, dtype=torch.float64))
        return few_step_sample(
            lambda z, index: z0(z, torch.full((len(z),), timesteps[index], device=z.device)),
            noise(),
            alphas.tolist(),
            sigmas.tolist(),
            noise,
        )


def decode_pictures(generator: Generator, latents: Tensor) -> Tensor:
    """Latents to pictures (B, 3, H, W) in [0, 1], on the CPU."""
    import torch

    with torch.inference_mode():
        return (generator.decode(latents).float() / 2 + 0.5).clamp(0, 1).cpu()
