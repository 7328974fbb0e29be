"""Flow models (SD3's kind of noise) in ComfyUI: the trained levels, and the sampler against diffusers' scheduler."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

# shift u / (1 + (shift - 1) u) with shift 3, by hand, at u = 1, 3/4, 1/2, 1/4.
LEVELS = {1: [1.0], 2: [1.0, 0.75], 4: [1.0, 0.9, 0.75, 0.5]}


@pytest.fixture(scope="module")
def results(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Run the script in ComfyUI's process and return its results."""
    outputs = tmp_path_factory.mktemp("flow") / "outputs.safetensors"
    run_inside(runtime, "flow.py", outputs)
    return load_file(outputs)


@pytest.mark.parametrize("steps", LEVELS)
def test_trained_levels_follow_the_models_shift(results: dict[str, Tensor], steps: int) -> None:
    assert torch.allclose(results[f"sigmas.{steps}"], torch.tensor([*LEVELS[steps], 0.0]), atol=1e-6)


@pytest.mark.parametrize("steps", LEVELS)
def test_the_sampler_equals_diffusers_stochastic_flow_scheduler(results: dict[str, Tensor], steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=LEVELS[steps])
    generator = torch.Generator().manual_seed(21)
    z = torch.randn(1, 16, 8, 8, generator=generator)
    for timestep, sigma in zip(scheduler.timesteps, LEVELS[steps], strict=True):
        velocity = torch.tanh(z) / 2 + sigma
        z = scheduler.step(velocity, timestep, z, generator=generator).prev_sample
    assert float((results[f"sampled.{steps}"] - z).abs().max()) < 1e-5


def test_a_soft_mask_gives_the_model_noise_of_full_strength(results: dict[str, Tensor]) -> None:
    """ComfyUI's own mixture of fresh and first noise has a standard deviation of .71 where the mask is 1/2."""
    sigma, mask = results["soft.sigma"], results["soft.mask"]
    z0 = mask * results["soft.first_prediction"] + (1 - mask) * 0.5  # the latent that the mask keeps
    noise = (results["soft.given"] - (1 - sigma) * z0) / sigma
    masked, half, kept = noise[..., :32], noise[..., 32:48], noise[..., 48:]
    for part in (masked, half, kept):
        assert float(part.std()) == pytest.approx(1, abs=0.02)
        assert abs(float(part.mean())) < 0.02
    # As diffusers' inpainting pipelines do: what is kept has the first noise, what is made anew has not.
    first = results["soft.first_noise"]
    torch.testing.assert_close(kept, first[..., 48:], atol=1e-4, rtol=1e-4)
    assert abs(float((masked * first[..., :32]).mean())) < 0.02
    assert float((half * first[..., 32:48]).mean()) == pytest.approx(0.5**0.5, abs=0.02)
