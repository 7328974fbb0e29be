"""A toy with an exact teacher: two moons as a mixture of Gaussians, whose score is known in closed form.

Points of the plane travel as latents (B, 2, 1, 1). The condition says which moon: a one-hot vector (B, 2), and all ones
for the unconditional teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flash_diffusion.flash_core.denoiser import Conditioning, Role
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.process import Process
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise

SPREAD = 0.12
COMPONENTS = 12  # of each moon


def moon_centres() -> Tensor:
    """The mixture's means (2 COMPONENTS, 2), first one moon, then the other, at about unit scale."""
    angle = torch.linspace(0, math.pi, COMPONENTS)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    centres = torch.cat([upper, lower])
    return (centres - centres.mean(0)) * 1.2


class TwoMoons(nn.Module):
    """The exact denoiser of two moons, with one small network per trained role as its adapter.

    The teacher is the mixture's posterior mean, no network at all; an adapter adds to the output, and starts at 0.
    """

    def __init__(self, process: Process, width: int = 64) -> None:
        super().__init__()
        self.process = process
        self.register_buffer("centres", moon_centres())
        self.adapters = nn.ModuleDict({role: _adapter(width) for role in ("student", "critic")})
        self._role: Role = "teacher"

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        z0, noise, _ = self._posterior(z_t, t, conditioning)
        output = self.process.target(z0, noise, t)  # affine in (z0, noise), so it holds for their means
        if self._role == "teacher":
            return output
        alpha, sigma = self.process.alpha_sigma(t)
        facts = torch.cat([z_t.flatten(1), alpha[:, None], sigma[:, None], conditioning.vector], 1)
        return output + self.adapters[self._role](facts)[:, :, None, None]

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Return the hidden state: the noisy point with its noise level, and the predicted clean point."""
        z0, _, belongs = self._posterior(z_t, t, conditioning)
        sigma = self.process.alpha_sigma(t)[1][:, None]
        point = torch.cat([z_t.flatten(1), z0.flatten(1), sigma, conditioning.vector, z_t.flatten(1) ** 2], 1)
        return [point[:, :, None, None], belongs[:, :, None, None]]

    feature_channels = (9, 2 * COMPONENTS)

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        before, self._role = self._role, role
        try:
            yield
        finally:
            self._role = before

    def _posterior(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        """E[z0 | z_t], E[noise | z_t] (B, 2, 1, 1) and the components' probabilities (B, M)."""
        alpha, sigma = (value[:, None] for value in self.process.alpha_sigma(t))
        variance = alpha**2 * SPREAD**2 + sigma**2
        away = z_t.flatten(1)[:, None] - alpha[:, :, None] * self.centres  # (B, M, 2)
        prior = conditioning.vector.repeat_interleave(COMPONENTS, 1).log()
        belongs = (prior - away.square().sum(2) / (2 * variance)).softmax(1)
        away = (belongs[:, :, None] * away).sum(1)
        z0 = belongs @ self.centres + alpha * SPREAD**2 / variance * away
        noise = sigma / variance * away
        return z0[:, :, None, None], noise[:, :, None, None], belongs


def _adapter(width: int) -> nn.Sequential:
    network = nn.Sequential(
        nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    )
    last = nn.Linear(width, 2)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return network.append(last)


def conditions(batch: int) -> tuple[Conditioning, Conditioning]:
    """Half of the batch for each moon, and the unconditional twin."""
    moon = torch.arange(batch) % 2
    return Conditioning(vector=torch.eye(2)[moon]), Conditioning(vector=torch.ones(batch, 2))


def data(batch: int, generator: torch.Generator) -> Tensor:
    """Points of the moons (B, 2, 1, 1), in the order of :func:`conditions`."""
    component = torch.randint(COMPONENTS, (batch,), generator=generator) + COMPONENTS * (torch.arange(batch) % 2)
    points = moon_centres()[component] + SPREAD * torch.randn(batch, 2, generator=generator)
    return points[:, :, None, None]


@torch.no_grad()
def draw(denoiser: TwoMoons, role: Role, steps: int, count: int, seed: int, stochasticity: float = 1.0) -> Tensor:
    """Few-step samples (count, 2) of a role, without guidance."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 2, 1, 1, generator=generator)
    timesteps = trailing_timesteps(denoiser.process, steps)
    alphas, sigmas = (values.tolist() for values in denoiser.process.alpha_sigma(torch.tensor(timesteps)))
    condition, _ = conditions(count)

    def denoise(z: Tensor, index: int) -> Tensor:
        t = torch.full((count,), timesteps[index])
        return denoiser.process.z0_from_output(z, denoiser.predict(z, t, condition), t)

    with denoiser.role(role):
        noise = generator_noise(z, generator)
        return few_step_sample(denoise, z, alphas, sigmas, noise, stochasticity=stochasticity).flatten(1)


def energy_distance(first: Tensor, second: Tensor) -> float:
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` of each moon's samples (N, 2), mean over the moons; 0 for equal laws."""
    distances = []
    for moon in range(2):
        x, y = first[moon::2].double(), second[moon::2].double()
        within = [torch.cdist(points, points).sum() / (len(points) * (len(points) - 1)) for points in (x, y)]
        distances.append((2 * torch.cdist(x, y).mean() - within[0] - within[1]).item())
    return sum(distances) / 2
