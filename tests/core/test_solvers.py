"""The teacher's solvers against diffusers' schedulers, with every sample at its own start in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_diffusion.flash_core.grid import trailing_fractions, trailing_timesteps
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess
from flash_diffusion.flash_core.solvers import Solver, levels, solve

from .helpers.networks import Network, random_network

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# The largest latents in these runs are about 15 (an epsilon network at t = 999 divides by alpha = .068).
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def noise(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def z0_of(process: Process, network: Network) -> Any:
    return lambda z, t, rows: process.z0_from_output(z, network(z, t), t)


def ours(
    process: Process, network: Network, z: Tensor, steps: int, solver: Solver, start: Sequence[int] | None = None
) -> Tensor:
    return solve(z0_of(process, network), process, z, trailing_timesteps(process, steps), start, solver)


def theirs(scheduler: Any, network: Network, z: Tensor, start: int = 0, **set_timesteps: Any) -> Tensor:
    scheduler.set_timesteps(**set_timesteps)
    scheduler.set_begin_index(start) if hasattr(scheduler, "set_begin_index") else None
    for t in scheduler.timesteps[start:]:
        z = scheduler.step(network(z, t.expand(len(z))), t, z).prev_sample
    return z


def ddim(prediction: str, **options: Any) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False, **options)


def multistep(prediction: str, solver: Solver) -> Any:
    return unipc(prediction) if solver == "unipc" else dpm(prediction, int(solver[-2]))


def unipc(prediction: str) -> UniPCMultistepScheduler:
    options = {"timestep_spacing": "trailing", "solver_type": "bh2", "final_sigmas_type": "zero"}
    return UniPCMultistepScheduler(**BETAS, prediction_type=prediction, solver_order=2, **options)


def dpm(prediction: str, order: int = 2, **options: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        **BETAS,
        prediction_type=prediction,
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=order,
        **options,
    )


# -- against diffusers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 50])  # here the step 1000 // N of diffusers' DDIM stays on its grid
def test_ddim_equals_diffusers(prediction: str, steps: int) -> None:
    process, network, z = VPProcess.from_betas(prediction=prediction), random_network(steps), noise(2)
    expected = theirs(ddim(prediction), network, z, num_inference_steps=steps)
    assert torch.allclose(ours(process, network, z, steps, "ddim"), expected, **TOLERANCE)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15, 16, 32])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc"])
def test_multistep_solvers_equal_diffusers(prediction: str, steps: int, solver: Solver) -> None:
    process, network, z = VPProcess.from_betas(prediction=prediction), random_network(steps), noise(2)
    expected = theirs(multistep(prediction, solver), network, z, num_inference_steps=steps)
    assert torch.allclose(ours(process, network, z, steps, solver), expected, **TOLERANCE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 32])
def test_euler_on_flow_equals_diffusers(shift: float, steps: int) -> None:
    network, z = random_network(steps), noise(2)
    expected = theirs(FlowMatchEulerDiscreteScheduler(shift=shift), network, z, sigmas=trailing_fractions(steps))
    assert torch.allclose(ours(FlowProcess(shift), network, z, steps, "euler"), expected, **TOLERANCE)


@pytest.mark.parametrize("steps", [4, 8, 20])
def test_ddim_from_zero_snr_equals_diffusers(steps: int) -> None:
    process = VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True)
    network, z = random_network(steps), noise(2)
    scheduler = ddim("v_prediction", rescale_betas_zero_snr=True)
    expected = theirs(scheduler, network, z, num_inference_steps=steps)
    assert torch.allclose(ours(process, network, z, steps, "ddim"), expected, **TOLERANCE)


@pytest.mark.parametrize("steps", [2, 4, 32])
def test_dpm_solver_on_diffusers_own_zero_snr_schedule(steps: int) -> None:
    # This scheduler replaces the 0 at the end of alphas_cumprod by 2^-24; read from it, as a trainer would.
    network, z = random_network(steps), noise(2)
    scheduler = dpm("v_prediction", rescale_betas_zero_snr=True)
    process = VPProcess(scheduler.alphas_cumprod, "v_prediction")
    assert float(process.alphas_cumprod[-1]) == 2**-24
    expected = theirs(scheduler, network, z, num_inference_steps=steps)
    assert torch.allclose(ours(process, network, z, steps, "dpmpp_2m"), expected, **TOLERANCE)


def test_dpm_solver_takes_no_history_from_a_point_without_signal() -> None:
    # log(alpha/sigma) is -inf there: the step is infinitely long and its slope 0. One first-order step, then afresh.
    process = VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True)
    network, z = random_network(3), noise(2)
    grid = trailing_timesteps(process, 8)
    states: list[Tensor] = []
    solve(z0_of(process, network), process, z, grid, None, "ddim", lambda index, z: states.append(z.clone()))
    for solver in ("dpmpp_2m", "dpmpp_3m", "unipc"):
        afresh = ours(process, network, states[1], 8, solver, [1, 1])
        assert torch.allclose(ours(process, network, z, 8, solver), afresh, atol=1e-6)


# -- starts of their own ---------------------------------------------------------------------------------------------

SOLVERS_AND_PROCESSES = [
    ("dpmpp_2m", VPProcess.from_betas()),
    ("ddim", VPProcess.from_betas(prediction="v_prediction")),
    ("dpmpp_2m", VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True)),
    ("euler", FlowProcess(3.0)),
    ("dpmpp_2m", FlowProcess(3.0)),
    ("dpmpp_3m", VPProcess.from_betas()),
    ("dpmpp_3m", VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True)),
    ("unipc", VPProcess.from_betas()),
    ("unipc", VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True)),
    ("unipc", FlowProcess(3.0)),
]


@pytest.mark.parametrize(("solver", "process"), SOLVERS_AND_PROCESSES)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(start=st.lists(st.integers(0, 7), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_samples_in_one_batch_run_as_if_alone(solver: Solver, process: Process, start: list[int], seed: int) -> None:
    network, z = random_network(0), noise(len(start), seed)
    together = ours(process, network, z, 8, solver, start)
    alone = torch.cat([ours(process, network, z[[row]], 8, solver, [first]) for row, first in enumerate(start)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc"])
def test_late_starts_equal_diffusers(prediction: str, solver: Solver) -> None:
    # First order at each sample's OWN first step: the neighbours' history must not leak in.
    process, network = VPProcess.from_betas(prediction=prediction), random_network(1)
    start, z = [0, 5, 17, 30, 31], noise(5)
    together = ours(process, network, z, 32, solver, start)
    for row, first in enumerate(start):
        expected = theirs(multistep(prediction, solver), network, z[[row]], first, num_inference_steps=32)
        assert torch.allclose(together[[row]], expected, **TOLERANCE)


def test_late_starts_of_ddim_and_euler_equal_diffusers() -> None:
    network, start, z = random_network(2), [0, 3, 19], noise(3)
    process = VPProcess.from_betas()
    together = ours(process, network, z, 20, "ddim", start)
    for row, first in enumerate(start):
        expected = theirs(ddim("epsilon"), network, z[[row]], first, num_inference_steps=20)
        assert torch.allclose(together[[row]], expected, **TOLERANCE)
    flowing = ours(FlowProcess(3.0), network, z, 20, "euler", start)
    for row, first in enumerate(start):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        expected = theirs(scheduler, network, z[[row]], first, sigmas=trailing_fractions(20))
        assert torch.allclose(flowing[[row]], expected, **TOLERANCE)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(start=st.lists(st.integers(0, 15), min_size=1, max_size=6))
def test_solver_calls_the_model_once_per_grid_point_with_started_samples_only(start: list[int]) -> None:
    process, network = VPProcess.from_betas(), random_network(0)
    grid = trailing_timesteps(process, 16)
    asked: list[tuple[float, list[int]]] = []

    def predict(z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        assert len(z) == len(t) == len(rows)
        assert len(set(t.tolist())) == 1
        asked.append((t[0].item(), rows.tolist()))
        return process.z0_from_output(z, network(z, t), t)

    solve(predict, process, noise(len(start)), grid, start)
    assert [t for t, _ in asked] == grid[min(start) :]
    assert [rows for _, rows in asked] == [
        [row for row, first in enumerate(start) if first <= index] for index in range(min(start), 16)
    ]
    assert sum(len(rows) for _, rows in asked) == sum(16 - first for first in start)


# -- properties of every solver --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "process"), SOLVERS_AND_PROCESSES)
def test_solver_reaches_a_constant_prediction_exactly(solver: Solver, process: Process) -> None:
    # With a constant prediction, every solver ends exactly at it, for every noise.
    answer = noise(3, 7)
    solved = solve(
        lambda z, t, rows: answer[rows], process, noise(3), trailing_timesteps(process, 8), [0, 4, 7], solver
    )
    assert torch.allclose(solved, answer, atol=1e-6)


def test_second_order_is_more_accurate_than_first_order() -> None:
    # The exact path: for Gaussian data of variance v, z / sqrt(alpha^2 v + sigma^2) is constant. The error is measured
    # in the middle of the path, since the last step to sigma = 0 is of first order for both solvers.
    process, variance, z = VPProcess.from_betas(), 0.3, noise(4)

    def spread(t: Tensor) -> Tensor:
        alpha, sigma = process.alpha_sigma(t)
        return (alpha**2 * variance + sigma**2)[:, None, None, None]

    def predict(z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return process.alpha_sigma(t)[0][:, None, None, None] * variance / spread(t) * z

    def error(solver: Solver, steps: int) -> float:
        states: list[Tensor] = []
        grid = trailing_timesteps(process, steps)
        solve(predict, process, z, grid, None, solver, lambda index, z: states.append(z.clone()))
        middle = steps // 2
        exact = z * (spread(torch.tensor([grid[middle]])) / spread(torch.tensor([grid[0]]))).sqrt()
        return (states[middle] - exact).abs().max().item()

    assert error("dpmpp_2m", 32) < 0.2 * error("ddim", 32)
    assert error("ddim", 64) == pytest.approx(error("ddim", 32) / 2, rel=0.2)
    assert error("dpmpp_2m", 64) < 0.35 * error("dpmpp_2m", 32)


def test_observe_sees_every_grid_point_before_it_is_evaluated() -> None:
    process, network, z = VPProcess.from_betas(), random_network(0), noise(2)
    grid = trailing_timesteps(process, 4)
    seen: list[tuple[int, Tensor]] = []
    end = solve(
        z0_of(process, network), process, z, grid, None, "ddim", lambda index, z: seen.append((index, z.clone()))
    )
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0][1], z)
    for index, state in seen:  # a first-order path can be taken up again from any of its points
        resumed = solve(z0_of(process, network), process, state, grid, [index, index], "ddim")
        assert torch.allclose(resumed, end, atol=1e-5)


def test_solver_does_not_change_its_input() -> None:
    process, z = VPProcess.from_betas(), noise(3)
    before = z.clone()
    ours(process, random_network(0), z, 8, "dpmpp_2m", [0, 2, 5])
    assert torch.equal(z, before)


def test_levels_end_at_the_clean_latent() -> None:
    alphas, sigmas = levels(FlowProcess(3.0), trailing_timesteps(FlowProcess(3.0), 4))
    assert alphas == pytest.approx([0, 0.1, 0.25, 0.5, 1])
    assert sigmas == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_wrong_starts_and_solvers_are_named() -> None:
    process, network, z = VPProcess.from_betas(), random_network(0), noise(2)
    grid = trailing_timesteps(process, 4)
    for wrong in ([0], [0, 4], [0, -1]):
        with pytest.raises(ValueError, match=r"start must hold 2 indices in 0\.\.3"):
            solve(z0_of(process, network), process, z, grid, wrong)
    with pytest.raises(ValueError, match="unknown solver 'heun'.*dpmpp_2m, dpmpp_3m, unipc, ddim, euler"):
        solve(z0_of(process, network), process, z, grid, None, "heun")
