"""Noise processes against diffusers, against figures worked by hand, and by property."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess, broadcast, cumulative_alphas

from .helpers.networks import process_name, processes

BETAS = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "squaredcos_cap_v2": (0.0, 0.0),  # the cosine schedule uses no start and no end
}

every_process = pytest.mark.parametrize("process", processes(), ids=process_name)


def latents(batch: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", BETAS)
def test_alphas_cumprod_equal_diffusers(schedule: str) -> None:
    start, end = BETAS[schedule]
    theirs = DDPMScheduler(beta_schedule=schedule, beta_start=start or 1e-4, beta_end=end or 0.02).alphas_cumprod
    ours = cumulative_alphas(schedule, start, end, False, 1000)
    assert ours.shape == (1000,)
    assert torch.allclose(ours.float(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr_equals_diffusers(schedule: str) -> None:
    start, end = BETAS[schedule]
    betas = DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end).betas
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas.double()), 0)
    ours = cumulative_alphas(schedule, start, end, True, 1000)
    assert torch.allclose(ours, theirs, atol=1e-6)
    plain = cumulative_alphas(schedule, start, end, False, 1000)
    assert float(ours[-1]) == 0.0
    assert float(ours[0]) == pytest.approx(float(plain[0]), rel=1e-12)


def test_sigma_range_of_stable_diffusion_equals_the_published_one() -> None:
    # sigma = sigma_t / alpha_t of Stable Diffusion 1.x runs from 0.0292 to 14.6146 (k-diffusion's figures).
    alpha, sigma = VPProcess.from_betas().alpha_sigma(torch.tensor([0, 999]))
    assert (sigma / alpha).tolist() == pytest.approx([0.0292, 14.6146], abs=5e-5)


def test_vp_noise_preserves_variance_and_grows() -> None:
    for process in (VPProcess.from_betas(), VPProcess.from_betas(zero_terminal_snr=True, prediction="v_prediction")):
        alpha, sigma = process.alpha_sigma(torch.arange(1000))
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(1000), atol=1e-6)
        assert bool((alpha.diff() < 0).all())
        assert bool((sigma.diff() >= 0).all())


def test_vp_rounds_fractional_timesteps_to_the_nearest_index() -> None:
    process = VPProcess.from_betas()
    fractional = process.alpha_sigma(torch.tensor([748.6, 749.0, 749.4]))
    whole = process.alpha_sigma(torch.tensor([749, 749, 749]))
    assert torch.equal(fractional[0], whole[0])
    assert torch.equal(fractional[1], whole[1])


def test_a_schedulers_alphas_cumprod_are_not_changed() -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.015)
    alpha, _ = VPProcess(scheduler.alphas_cumprod).alpha_sigma(torch.tensor([0, 500, 999]))
    assert torch.allclose(alpha, scheduler.alphas_cumprod[[0, 500, 999]].sqrt(), atol=1e-7)


# -- add noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_vp_add_noise_equals_diffusers(zero_terminal_snr: bool) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    process = VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=zero_terminal_snr)
    t = torch.tensor([0, 1, 10, 249, 250, 499, 500, 749, 750, 999])
    z0, noise = latents(len(t), 0), latents(len(t), 1)
    assert torch.allclose(process.add_noise(z0, noise, t), scheduler.add_noise(z0, noise, t), atol=1e-5)
    assert torch.allclose(process.target(z0, noise, t), scheduler.get_velocity(z0, noise, t), atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_add_noise_equals_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(32)
    t = scheduler.timesteps
    z0, noise = latents(len(t), 0), latents(len(t), 1)
    theirs = scheduler.scale_noise(z0, t, noise)
    assert torch.allclose(FlowProcess(shift).add_noise(z0, noise, t), theirs, atol=1e-5)


def test_each_sample_gets_its_own_noise_level() -> None:
    process = VPProcess.from_betas()
    z0, noise, t = latents(3, 0), latents(3, 1), torch.tensor([10, 500, 999])
    together = process.add_noise(z0, noise, t)
    alone = torch.cat([process.add_noise(z0[[row]], noise[[row]], t[[row]]) for row in range(3)])
    assert torch.equal(together, alone)


# -- outputs and clean latents ---------------------------------------------------------------------------------------


def test_z0_from_output_by_hand() -> None:
    # alphas_cumprod .64: alpha .8, sigma .6; z = 2, output = .5
    bar, z, out, t = (
        torch.tensor([0.64]),
        torch.full((1, 1, 1, 1), 2.0),
        torch.full((1, 1, 1, 1), 0.5),
        torch.tensor([0]),
    )
    assert VPProcess(bar, "epsilon").z0_from_output(z, out, t).item() == pytest.approx((2 - 0.6 * 0.5) / 0.8)
    assert VPProcess(bar, "v_prediction").z0_from_output(z, out, t).item() == pytest.approx(0.8 * 2 - 0.6 * 0.5)
    assert VPProcess(bar, "sample").z0_from_output(z, out, t).item() == 0.5
    assert FlowProcess().z0_from_output(z, out, torch.tensor([250.0])).item() == pytest.approx(2 - 0.25 * 0.5)


def test_targets_by_hand() -> None:
    bar, z0, noise, t = (
        torch.tensor([0.64]),
        torch.full((1, 1, 1, 1), 2.0),
        torch.full((1, 1, 1, 1), 3.0),
        torch.tensor([0]),
    )
    assert VPProcess(bar, "epsilon").target(z0, noise, t).item() == 3
    assert VPProcess(bar, "v_prediction").target(z0, noise, t).item() == pytest.approx(0.8 * 3 - 0.6 * 2)
    assert VPProcess(bar, "sample").target(z0, noise, t).item() == 2
    assert FlowProcess().target(z0, noise, torch.tensor([700.0])).item() == 1


@every_process
@settings(deadline=None, derandomize=True, max_examples=60)
@given(t=st.integers(1, 998), seed=st.integers(0, 2**32 - 1))
def test_output_from_z0_inverts_z0_from_output(process: Process, t: int, seed: int) -> None:
    z_t, z0 = latents(1, seed).double(), latents(1, seed + 1).double()
    time = torch.tensor([float(t)])
    output = process.output_from_z0(z_t, z0, time)
    assert torch.allclose(process.z0_from_output(z_t, output, time), z0, atol=1e-9)
    assert torch.allclose(process.output_from_z0(z_t, process.z0_from_output(z_t, z0, time), time), z0, atol=1e-9)


@every_process
@settings(deadline=None, derandomize=True, max_examples=60)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**32 - 1))
def test_the_target_gives_the_clean_latent_at_every_timestep(process: Process, t: int, seed: int) -> None:
    z0, noise = latents(1, seed).double(), latents(1, seed + 1).double()
    time = torch.tensor([float(t)])
    z_t = process.add_noise(z0, noise, time)
    assert torch.allclose(process.z0_from_output(z_t, process.target(z0, noise, time), time), z0, atol=1e-4)


@every_process
@settings(deadline=None, derandomize=True, max_examples=30)
@given(t=st.integers(1, 998), seed=st.integers(0, 2**32 - 1))
def test_target_equals_output_from_z0(process: Process, t: int, seed: int) -> None:
    z0, noise = latents(1, seed).double(), latents(1, seed + 1).double()
    time = torch.tensor([float(t)])
    implied = process.output_from_z0(process.add_noise(z0, noise, time), z0, time)
    assert torch.allclose(implied, process.target(z0, noise, time), atol=1e-4)


@every_process
@settings(deadline=None, derandomize=True, max_examples=30)
@given(t=st.integers(0, 999), weight=st.floats(-3, 12), seed=st.integers(0, 2**32 - 1))
def test_z0_is_affine_in_the_output(process: Process, t: int, weight: float, seed: int) -> None:
    # So guidance can act on z0: outputs mixed with weights that sum to 1 give z0 mixed with the same weights.
    z_t, first, second = latents(1, seed).double(), latents(1, seed + 1).double(), latents(1, seed + 2).double()
    time = torch.tensor([float(t)])
    mixed = process.z0_from_output(z_t, (1 - weight) * first + weight * second, time)
    apart = (1 - weight) * process.z0_from_output(z_t, first, time) + weight * process.z0_from_output(z_t, second, time)
    assert torch.allclose(mixed, apart, rtol=1e-6, atol=1e-6 * float(apart.abs().max() + 1))


def test_v_target_at_zero_terminal_snr_is_minus_z0() -> None:
    process = VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True)
    z0, noise, t = latents(2, 0), latents(2, 1), torch.tensor([999, 999])
    assert torch.equal(process.add_noise(z0, noise, t), noise)
    assert torch.allclose(process.target(z0, noise, t), -z0)


# -- the schedule's fractions ----------------------------------------------------------------------------------------


def test_shift_3_gives_the_published_sigmas_of_sd3() -> None:
    process = FlowProcess(shift=3.0)
    assert [process.timestep(u) / 1000 for u in (1, 0.75, 0.5, 0.25)] == pytest.approx([1, 0.9, 0.75, 0.5])


@pytest.mark.parametrize("shift", [1.0, 1.73, 3.0])
def test_flow_uniform_timesteps_are_shifted(shift: float) -> None:
    process = FlowProcess(shift)
    tau = torch.tensor([0, 10, 250, 500, 750, 999])
    expected = [1000 * shift * u / (1 + (shift - 1) * u) for u in (tau / 1000).tolist()]
    t = process.uniform_timestep(tau)
    assert t.shape == tau.shape
    assert t.tolist() == pytest.approx(expected, rel=1e-6)


def test_vp_uniform_timesteps_scale_with_the_schedules_length() -> None:
    tau = torch.tensor([0, 10, 250, 500, 750, 999])
    assert torch.equal(VPProcess.from_betas().uniform_timestep(tau), tau)
    short = VPProcess.from_betas(num_timesteps=100)
    assert short.uniform_timestep(tau).tolist() == [0, 1, 25, 50, 75, 99]


@pytest.mark.parametrize(
    ("process", "kind", "timesteps", "others", "words"),
    [
        (VPProcess.from_betas(), "vp", [0, 1, 999, 999.0], [-1, 0.5, 1000, math.nan], "whole numbers of 0 to 999"),
        (VPProcess.from_betas(num_timesteps=100), "vp", [0, 99], [100], "whole numbers of 0 to 99"),
        (FlowProcess(3.0), "flow", [0.1, 500, 1000], [0, 1000.1, math.nan], "numbers above 0 and up to 1000"),
    ],
)
def test_is_timestep_accepts_exactly_the_timesteps_of_the_process(
    process: Process, kind: str, timesteps: list[float], others: list[float], words: str
) -> None:
    assert process.kind == kind
    assert all(process.is_timestep(t) for t in timesteps)
    assert not any(process.is_timestep(t) for t in others)
    assert process.timesteps_in_words.startswith(words)


# -- boundary scaling ------------------------------------------------------------------------------------------------


def test_boundary_scaling_by_hand() -> None:
    c_skip, c_out = VPProcess.from_betas().boundary_scaling(torch.tensor([0, 1, 249, 499, 749, 999]))
    assert c_skip[0].item() == 1.0
    assert c_out[0].item() == 0.0
    assert c_skip[1].item() == pytest.approx(0.25 / 100.25)
    assert c_out[1].item() == pytest.approx(10 / math.sqrt(100.25))
    # On the trained grid it has no effect: c_skip < 3e-6.
    assert bool((c_skip[2:] < 3e-6).all())
    assert bool((c_out[2:] - 1).abs().max() < 1e-6)


def test_flow_has_no_boundary_scaling() -> None:
    c_skip, c_out = FlowProcess(3.0).boundary_scaling(torch.tensor([0.0, 500.0, 1000.0]))
    assert c_skip.tolist() == [0, 0, 0]
    assert c_out.tolist() == [1, 1, 1]


# -- errors ----------------------------------------------------------------------------------------------------------


def test_epsilon_with_zero_terminal_snr_raises_an_error() -> None:
    with pytest.raises(ValueError, match="zero terminal SNR"):
        VPProcess.from_betas(prediction="epsilon", zero_terminal_snr=True)


def test_wrong_settings_raise_an_error_with_the_expected_values() -> None:
    with pytest.raises(ValueError, match="not 'flow'"):
        VPProcess.from_betas(prediction="flow")
    with pytest.raises(ValueError, match="not 'epsilon'"):
        FlowProcess(prediction="epsilon")
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        FlowProcess(shift=0)
    with pytest.raises(ValueError, match="unknown beta schedule 'cosine'.*squaredcos_cap_v2"):
        VPProcess.from_betas(schedule="cosine")


def test_broadcast_adds_dimensions_of_size_1() -> None:
    assert broadcast(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4, 5)).shape == (2, 1, 1, 1)
    assert broadcast(torch.tensor([1.0, 2.0]), torch.zeros(2, 3)).shape == (2, 1)


def test_a_process_first_used_for_sampling_can_still_train() -> None:
    process = VPProcess.from_betas()
    t = torch.tensor([500])
    with torch.inference_mode():
        process.alpha_sigma(t)
    z0 = torch.randn(1, 4, 2, 2, requires_grad=True)
    process.add_noise(z0, torch.randn_like(z0), t).sum().backward()
    assert torch.equal(z0.grad, process.alpha_sigma(t)[0].expand_as(z0))
