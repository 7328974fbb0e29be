"""The few-step sampler against diffusers' few-step schedulers on the same generator stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from flash_diffusion.flash_core.grid import trailing_fractions, trailing_timesteps
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess
from flash_diffusion.flash_core.sampler import few_step_sample, generator_noise, item_noise

from .helpers.networks import Network, random_network

SHAPE = (2, 4, 3, 3)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def denoiser(process: Process, network: Network, timesteps: list[float]) -> Callable[[Tensor, int], Tensor]:
    def denoise(z: Tensor, index: int) -> Tensor:
        t = torch.full((len(z),), timesteps[index])
        return process.z0_from_output(z, network(z, t), t)

    return denoise


def sample(process: Process, network: Network, steps: int, seed: int, **options: Any) -> Tensor:
    timesteps = trailing_timesteps(process, steps)
    alphas, sigmas = (values.tolist() for values in process.alpha_sigma(torch.tensor(timesteps)))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(SHAPE, generator=generator)
    noise = generator_noise(z, generator)  # the same stream goes on, past the initial draw
    return few_step_sample(denoiser(process, network, timesteps), z, alphas, sigmas, noise, **options)


def run(scheduler: Any, network: Network, seed: int, **step: Any) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        generator = torch.default_generator.manual_seed(seed)  # diffusers 0.35's flow scheduler reads no other one
        z = torch.randn(SHAPE, generator=generator)
        options = {name: generator for name in ("generator",) if step.get("stochastic", True)}
        for t in scheduler.timesteps:
            z = scheduler.step(network(z, t.expand(len(z))), t, z, **options).prev_sample
    return z


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_step_sampling_equals_diffusers_lcm_scheduler_on_the_trained_grid(prediction: str, steps: int) -> None:
    network = random_network(steps)
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(timesteps=[int(t) for t in trailing_timesteps(VPProcess.from_betas(), steps)])
    expected = run(scheduler, network, seed=3)
    got = sample(VPProcess.from_betas(prediction=prediction), network, steps, seed=3)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_step_sampling_equals_diffusers_stochastic_flow_sampling(shift: float, steps: int) -> None:
    network = random_network(steps)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=trailing_fractions(steps))
    expected = run(scheduler, network, seed=4)
    got = sample(FlowProcess(shift), network, steps, seed=4)
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_without_stochasticity_sampling_equals_ddim(steps: int) -> None:
    network = random_network(steps)
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    expected = run(scheduler, network, seed=5, stochastic=False)
    got = sample(VPProcess.from_betas(), network, steps, seed=5, stochasticity=0.0)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_without_stochasticity_flow_sampling_equals_euler(steps: int) -> None:
    network = random_network(steps)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=trailing_fractions(steps))
    expected = run(scheduler, network, seed=6)
    assert torch.allclose(sample(FlowProcess(3.0), network, steps, seed=6, stochasticity=0.0), expected, atol=1e-5)


def test_a_k_diffusion_model_gets_the_same_picture() -> None:
    # ComfyUI's epsilon models count z / alpha: alpha = 1 and sigma = sigma_t / alpha_t. Same pictures, other units.
    process, network = VPProcess.from_betas(), random_network(0)
    timesteps = trailing_timesteps(process, 4)
    alphas, sigmas = process.alpha_sigma(torch.tensor(timesteps))
    denoise = denoiser(process, network, timesteps)
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(SHAPE, generator=generator)
    scaled = few_step_sample(
        lambda x, index: denoise(x * alphas[index], index),
        z / alphas[0],
        [1.0] * 4,
        (sigmas / alphas).tolist(),
        generator_noise(z, generator),
    )
    assert torch.allclose(scaled, sample(process, network, 4, seed=7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "stochasticity", "draws"), [(1, 1.0, 0), (1, 0.5, 0), (4, 1.0, 3), (4, 0.5, 3), (4, 0.0, 0)]
)
def test_noise_is_drawn_once_between_steps_and_never_for_one(steps: int, stochasticity: float, draws: int) -> None:
    drawn = []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.zeros(SHAPE)

    few_step_sample(
        lambda z, index: z, torch.zeros(SHAPE), [0.5] * steps, [0.5] * steps, noise, stochasticity=stochasticity
    )
    assert len(drawn) == draws


def test_the_stream_never_repeats_the_initial_noise() -> None:
    # The mistake of the oldest ComfyUI on a CPU: it seeds again, so the first fresh noise IS the initial noise.
    generator = torch.Generator().manual_seed(8)
    initial = torch.randn(SHAPE, generator=generator)
    draw = generator_noise(initial, generator)
    draws = [initial, draw(), draw(), draw()]
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.5
    again = torch.Generator().manual_seed(8)
    assert all(torch.equal(torch.randn(SHAPE, generator=again), drawn) for drawn in draws)


@pytest.mark.parametrize("stochasticity", [0.0, 0.3, 0.7, 1.0])
def test_renoised_latents_have_the_level_the_next_step_expects(stochasticity: float) -> None:
    # A perfect denoiser of z0 = 0: its input must be N(0, sigma_i^2) at every step, for every stochasticity.
    sigmas, generator = [1.0, 0.8, 0.4], torch.Generator().manual_seed(9)
    z = torch.randn(64, 4, 16, 16, generator=generator)
    handed: list[Tensor] = []

    def denoise(z: Tensor, index: int) -> Tensor:
        handed.append(z)
        return torch.zeros_like(z)

    few_step_sample(denoise, z, [0.0, 0.6, 0.9], sigmas, generator_noise(z, generator), stochasticity=stochasticity)
    assert [state.std().item() for state in handed] == pytest.approx(sigmas, rel=0.01)
    overlap = (handed[0] * handed[1]).mean().item() / (sigmas[0] * sigmas[1])
    assert overlap == pytest.approx((1 - stochasticity**2) ** 0.5, abs=0.01)


def test_the_callback_sees_each_prediction_and_its_input() -> None:
    process, network, seen = FlowProcess(3.0), random_network(1), []
    got = sample(process, network, 4, seed=1, callback=lambda index, z0, z: seen.append((index, z0, z)))
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], got)
    denoise = denoiser(process, network, trailing_timesteps(process, 4))
    assert all(torch.equal(denoise(z, index), z0) for index, z0, z in seen)


def test_wrong_levels_and_stochasticity_are_named() -> None:
    z = torch.zeros(SHAPE)
    for alphas, sigmas in (([], []), ([1.0], [1.0, 0.5])):
        with pytest.raises(ValueError, match="as many alphas as sigmas and at least one"):
            few_step_sample(lambda z, index: z, z, alphas, sigmas, lambda: z)
    with pytest.raises(ValueError, match=r"stochasticity must lie in 0\.\.1 .* got 1\.5"):
        few_step_sample(lambda z, index: z, z, [1.0], [1.0], lambda: z, stochasticity=1.5)


# -- every item its own stream ---------------------------------------------------------------------------------------

ITEM = (4, 8, 8)


def draws(initial: Tensor, seed: int, count: int = 3, **options: Any) -> Tensor:
    draw = item_noise(initial, seed, **options)
    return torch.stack([draw() for _ in range(count)], 1)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def largest_correlation(noises: Tensor) -> float:
    table = torch.corrcoef(noises.flatten(0, -4).flatten(1))
    return float((table - torch.eye(len(table))).abs().max())


def test_the_first_item_continues_the_stream_of_the_seed() -> None:
    generator = torch.Generator().manual_seed(7)
    stream = [torch.randn(1, *ITEM, generator=generator) for _ in range(4)]
    assert torch.equal(draws(stream[0], 7), torch.stack(stream[1:], 1))
    assert torch.equal(draws(seeded(7, 3, *ITEM), 7)[:1], torch.stack(stream[1:], 1))


def test_an_items_noise_depends_on_neither_its_place_nor_the_batch() -> None:
    batch = seeded(7, 5, *ITEM)
    expected = draws(batch, 7)
    for order in ([3], [4, 2], [1, 0, 1, 3], [4, 3, 2, 1, 0]):
        assert torch.equal(draws(batch[order], 7), expected[order])


def test_no_noise_is_used_twice() -> None:
    # Eight items that are re-noised three times: 32 noises, all of them independent.
    batch = seeded(11, 8, *ITEM)
    renoised = draws(batch, 11)
    # The first item continues the seed's stream, which also gave the initial noise of the other items.
    assert torch.equal(renoised[0], batch[1:4])
    assert largest_correlation(torch.cat([batch[:, None], renoised], 1)[1:]) < 0.3
    assert largest_correlation(torch.cat([batch[:1], renoised[0], renoised[1:].flatten(0, 1)])) < 0.3
    assert renoised.mean().item() == pytest.approx(0, abs=0.05)
    assert renoised.std().item() == pytest.approx(1, abs=0.05)


def test_another_seed_is_another_stream_for_the_same_initial_noise() -> None:
    initial = seeded(5, 2, *ITEM)  # such as RandomNoise with another seed than the sampler's
    assert largest_correlation(torch.cat([draws(initial, seed) for seed in (1, 2, 1 + 2**32)])) < 0.3


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 3, 2**64 - 1])
def test_seeds_of_64_bits_work(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(1, *ITEM, generator=generator) for _ in range(2))
    assert torch.equal(draws(first, seed, count=1)[:, 0], second)


def test_split_runs_without_noise_seed_each_item_by_its_latent() -> None:
    nothing, latents = torch.zeros(3, *ITEM), seeded(3, 3, *ITEM)
    expected = draws(nothing, 0, z=latents)
    assert largest_correlation(expected) < 0.3
    slightly_off = latents + 1e-6 * seeded(4, 3, *ITEM)  # a rounding difference, as from another batch size
    assert torch.equal(draws(nothing[:2], 0, z=slightly_off[[2, 0]]), expected[[2, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_noise_comes_in_the_dtype_of_the_initial_noise(dtype: torch.dtype) -> None:
    noise = draws(seeded(7, 2, *ITEM).to(dtype), 7)
    assert noise.dtype == dtype
    assert torch.equal(noise, draws(seeded(7, 2, *ITEM), 7).to(dtype)) == (dtype == torch.float32)
    assert torch.equal(noise[0], draws(seeded(7, 2, *ITEM), 7)[0].to(dtype))
