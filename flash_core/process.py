"""Noise processes: variance-preserving (epsilon, v, sample) and flow, behind one interface.

Every process defines ``z_t = alpha_t z0 + sigma_t eps`` and how a network's output at ``(z_t, t)`` gives ``z0``. A
process knows no solver: its noise level at ``t`` is the same on a solver's grid and off it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

Prediction: TypeAlias = Literal["epsilon", "v_prediction", "sample", "flow"]
ProcessKind: TypeAlias = Literal["vp", "flow"]
BetaSchedule: TypeAlias = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

NUM_TIMESTEPS = 1000
LCM_TIMESTEPS = 50  # original_inference_steps of diffusers' LCMScheduler

# The boundary scaling of consistency models as Flash Diffusion uses it: sigma_data^2 = .25, timesteps scaled by 10.
BOUNDARY_SIGMA_DATA_SQUARED = 0.25
BOUNDARY_TIMESTEP_SCALING = 10.0


class Process(Protocol):
    """A diffusion process. ``t`` is the timestep that the network gets, in 0..1000."""

    @property
    def kind(self) -> ProcessKind:
        """``vp`` or ``flow``, as Flash metadata writes it."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""
        ...

    @property
    def timesteps_in_words(self) -> str:
        """The timesteps of this process, for an error message."""
        ...

    def is_timestep(self, t: float) -> bool:
        """Return whether the network can be evaluated at ``t`` and ``z_t`` has noise there."""
        ...

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha_t, sigma_t)``, float32, shaped like ``t``."""
        ...

    def timestep(self, fraction: float) -> float:
        """The timestep at ``fraction`` of the trailing schedule, in (0, 1]; 1 is pure noise."""
        ...

    def fraction(self, t: float) -> float:
        """The fraction of the trailing schedule at which ``t`` lies: the inverse of :meth:`timestep`."""
        ...

    def uniform_timestep(self, tau: Tensor) -> Tensor:
        """Map uniform time ``tau`` in 0..999 (an integer tensor) to this process's timesteps, of the same shape."""
        ...

    def reference_timesteps(self, steps: int) -> list[float]:
        """The timesteps of diffusers' few-step scheduler for this process, from noise to image."""
        ...

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``alpha_t z0 + sigma_t noise`` for latents ``(B, ...)`` and timesteps ``(B,)``."""
        ...

    def z0_from_output(self, z_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean latent that the network's ``output`` at ``(z_t, t)`` implies."""
        ...

    def output_from_z0(self, z_t: Tensor, z0: Tensor, t: Tensor) -> Tensor:
        """The output that implies ``z0``: the inverse of :meth:`z0_from_output`; undefined where ``sigma_t`` is 0."""
        ...

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The output that the network should give at ``add_noise(z0, noise, t)``; defined at every ``t``."""
        ...

    def boundary_scaling(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(c_skip, c_out)`` of the student's output ``c_skip z_t + c_out z0_hat``, shaped like ``t``."""
        ...


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` to ``(B, 1, ..., 1)`` so that it multiplies ``like`` sample by sample."""
    return values.reshape(-1, *(1 for _ in range(like.ndim - 1)))


def cumulative_alphas(
    schedule: BetaSchedule, beta_start: float, beta_end: float, zero_terminal_snr: bool, num_timesteps: int
) -> Tensor:
    """``alphas_cumprod`` (T,) in float64 of the usual beta schedules.

    ``zero_terminal_snr`` shifts and scales ``sqrt(alphas_cumprod)`` so that its last value is 0 and its first one stays
    (Lin et al., arXiv 2305.08891, algorithm 1).
    """
    if schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    elif schedule == "squaredcos_cap_v2":
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2  # Nichol & Dhariwal 2021, eq. 17
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown beta schedule {schedule!r}; expected one of {', '.join(get_args(BetaSchedule))}")
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    if zero_terminal_snr:
        root = alphas_cumprod.sqrt()
        alphas_cumprod = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return alphas_cumprod


@dataclass(frozen=True, eq=False)
class VPProcess:
    """A variance-preserving process on discrete timesteps 0..T-1: SD 1.5, SD 2, SDXL, PixArt.

    Args:
        alphas_cumprod: (T,), decreasing, in [0, 1]; read it from the teacher's scheduler.
        prediction: what the network predicts. Where alpha is 0, epsilon holds no information about z0; so a schedule
            with zero terminal SNR raises an error with epsilon.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"a variance-preserving process predicts epsilon, v_prediction or sample, not {self.prediction!r}"
            )
        if self.prediction == "epsilon" and float(self.alphas_cumprod[-1]) == 0.0:
            raise ValueError(
                "this schedule has zero terminal SNR (alphas_cumprod ends at 0), where an epsilon prediction holds no "
                "image; use prediction 'v_prediction' or 'sample', or a schedule without the rescaling"
            )

    @classmethod
    def from_betas(
        cls,
        schedule: BetaSchedule = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction: Prediction = "epsilon",
        zero_terminal_snr: bool = False,
        num_timesteps: int = NUM_TIMESTEPS,
    ) -> VPProcess:
        """Build from a beta schedule; the defaults are Stable Diffusion's."""
        return cls(cumulative_alphas(schedule, beta_start, beta_end, zero_terminal_snr, num_timesteps), prediction)

    @property
    def kind(self) -> ProcessKind:
        """``vp``."""
        return "vp"

    @property
    def num_timesteps(self) -> int:
        """T, the number of discrete timesteps."""
        return len(self.alphas_cumprod)

    @property
    def timesteps_in_words(self) -> str:
        """Whole numbers of 0 to T - 1."""
        return f"whole numbers of 0 to {self.num_timesteps - 1}"

    def is_timestep(self, t: float) -> bool:
        """Return whether ``t`` is a whole number of 0 to T - 1."""
        return t in range(self.num_timesteps)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(alphas_cumprod[t])`` and ``sqrt(1 - alphas_cumprod[t])``; ``t`` is rounded to the nearest index."""
        if t.device not in self._tables:
            # Later calls reuse the tables: make ordinary tensors even if the first caller is in inference mode.
            with torch.inference_mode(False):
                bar = self.alphas_cumprod.double().cpu()
                self._tables[t.device] = (bar.sqrt().float().to(t.device), (1 - bar).sqrt().float().to(t.device))
        alphas, sigmas = self._tables[t.device]
        index = t.round().long() if t.is_floating_point() else t.long()
        return alphas[index], sigmas[index]

    def timestep(self, fraction: float) -> float:
        """``round(T fraction) - 1``: the trailing convention, 999 for 1 and 749 for .75 (ties to even, as numpy)."""
        return float(max(round(self.num_timesteps * fraction) - 1, 0))

    def fraction(self, t: float) -> float:
        """``(t + 1) / T``."""
        return (t + 1) / self.num_timesteps

    def uniform_timestep(self, tau: Tensor) -> Tensor:
        """``tau`` itself, at the scale of this process's T."""
        return tau if self.num_timesteps == NUM_TIMESTEPS else (tau * self.num_timesteps) // NUM_TIMESTEPS

    def reference_timesteps(self, steps: int) -> list[float]:
        """``LCMScheduler``: evenly from a table of 50 timesteps (4 steps: 999, 759, 499, 259).

        Raises:
            ValueError: ``steps`` is not in 1..50.
        """
        if not 1 <= steps <= LCM_TIMESTEPS:
            raise ValueError(f"the reference grid has 1 to {LCM_TIMESTEPS} steps, got {steps}")
        spacing = self.num_timesteps // LCM_TIMESTEPS
        table = [float(spacing * index - 1) for index in range(LCM_TIMESTEPS, 0, -1)]
        return [table[LCM_TIMESTEPS * index // steps] for index in range(steps)]

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``alpha_t z0 + sigma_t noise``."""
        alpha, sigma = (broadcast(value, z0) for value in self.alpha_sigma(t))
        return alpha * z0 + sigma * noise

    def z0_from_output(self, z_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """epsilon: ``(z_t - sigma e)/alpha``; v: ``alpha z_t - sigma v``; sample: the output."""
        if self.prediction == "sample":
            return output
        alpha, sigma = (broadcast(value, z_t) for value in self.alpha_sigma(t))
        if self.prediction == "epsilon":
            return (z_t - sigma * output) / alpha
        return alpha * z_t - sigma * output

    def output_from_z0(self, z_t: Tensor, z0: Tensor, t: Tensor) -> Tensor:
        """The output that implies ``z0``."""
        if self.prediction == "sample":
            return z0
        alpha, sigma = (broadcast(value, z_t) for value in self.alpha_sigma(t))
        if self.prediction == "epsilon":
            return (z_t - alpha * z0) / sigma
        return (alpha * z_t - z0) / sigma

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """epsilon: the noise; v: ``alpha noise - sigma z0``; sample: ``z0``."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return z0
        alpha, sigma = (broadcast(value, z0) for value in self.alpha_sigma(t))
        return alpha * noise - sigma * z0

    def boundary_scaling(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``c_skip = .25/((10 t)^2 + .25)``, ``c_out = 10 t/sqrt((10 t)^2 + .25)``, ``t`` in 0..999."""
        scaled = BOUNDARY_TIMESTEP_SCALING * t.float()
        denominator = scaled**2 + BOUNDARY_SIGMA_DATA_SQUARED
        return BOUNDARY_SIGMA_DATA_SQUARED / denominator, scaled / denominator.sqrt()


@dataclass(frozen=True)
class FlowProcess:
    """Rectified flow, ``z_s = (1 - s) z0 + s eps`` with velocity ``eps - z0``: SD3, SD3.5, Flux.

    Timesteps are ``1000 s``, as the network gets them. ``shift`` moves uniform time toward noise:
    ``s = shift u / (1 + (shift - 1) u)`` (Esser et al., arXiv 2403.03206, eq. 23).
    """

    shift: float = 1.0
    prediction: Prediction = "flow"

    def __post_init__(self) -> None:
        if self.prediction != "flow":
            raise ValueError(f"a flow process predicts 'flow' (a velocity), not {self.prediction!r}")
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    @property
    def kind(self) -> ProcessKind:
        """``flow``."""
        return "flow"

    @property
    def timesteps_in_words(self) -> str:
        """Numbers above 0 and up to 1000."""
        return f"numbers above 0 and up to {NUM_TIMESTEPS} (the noise level times {NUM_TIMESTEPS})"

    def is_timestep(self, t: float) -> bool:
        """Return whether ``t`` is above 0 and at most 1000."""
        return 0 < t <= NUM_TIMESTEPS

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(1 - s, s)`` with ``s = t / 1000``."""
        sigma = t.float() / NUM_TIMESTEPS
        return 1 - sigma, sigma

    def timestep(self, fraction: float) -> float:
        """``1000 s`` at uniform time ``fraction``."""
        return NUM_TIMESTEPS * self.shift * fraction / (1 + (self.shift - 1) * fraction)

    def fraction(self, t: float) -> float:
        """``s / (shift - (shift - 1) s)`` with ``s = t / 1000``."""
        sigma = t / NUM_TIMESTEPS
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def uniform_timestep(self, tau: Tensor) -> Tensor:
        """The same fraction of the shifted schedule."""
        fraction = tau.double() / NUM_TIMESTEPS
        return (NUM_TIMESTEPS * self.shift * fraction / (1 + (self.shift - 1) * fraction)).float()

    def reference_timesteps(self, steps: int) -> list[float]:
        """``FlowMatchEulerDiscreteScheduler``: evenly between its noise levels, then shifted once more.

        With shift 3, 4 steps are 1000, 858, 602, 9.
        """
        last = self.timestep(1 / NUM_TIMESTEPS) / NUM_TIMESTEPS
        evenly = [1 - (1 - last) * index / max(steps - 1, 1) for index in range(steps)]
        return [self.timestep(fraction) for fraction in evenly]

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``(1 - s) z0 + s noise``."""
        alpha, sigma = (broadcast(value, z0) for value in self.alpha_sigma(t))
        return alpha * z0 + sigma * noise

    def z0_from_output(self, z_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """``z_s - s v``."""
        return z_t - broadcast(self.alpha_sigma(t)[1], z_t) * output

    def output_from_z0(self, z_t: Tensor, z0: Tensor, t: Tensor) -> Tensor:
        """``(z_s - z0) / s``."""
        return (z_t - z0) / broadcast(self.alpha_sigma(t)[1], z_t)

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity ``noise - z0``, the same at every ``t``."""
        return noise - z0

    def boundary_scaling(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """No boundary scaling: ``(0, 1)``."""
        return torch.zeros_like(t, dtype=torch.float32), torch.ones_like(t, dtype=torch.float32)
