"""Timestep grids, the training mixture and snapped denoise, against the method's literals and diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_diffusion.flash_core.distiller import PUBLISHED_PHASES
from flash_diffusion.flash_core.grid import (
    MAX_FEW_STEPS,
    snapped_fractions,
    snapped_timesteps,
    timestep_mixture,
    trailing_fractions,
    trailing_timesteps,
)
from flash_diffusion.flash_core.process import FlowProcess, VPProcess

VP = VPProcess.from_betas()

# -- the trailing grid -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "timesteps"),
    [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249]), (5, [999, 799, 599, 399, 199])],
)
def test_trained_grid_literals(steps: int, timesteps: list[int]) -> None:
    assert trailing_timesteps(VP, steps) == timesteps


@pytest.mark.parametrize("steps", [n for n in range(1, 51) if n != 48])
def test_trailing_grid_is_that_of_diffusers(steps: int) -> None:
    for scheduler in (
        DDIMScheduler(timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    ):
        scheduler.set_timesteps(steps)
        assert trailing_timesteps(VP, steps) == scheduler.timesteps.tolist()


def test_the_one_grid_where_diffusers_rounds_a_tie_by_float_error() -> None:
    # 1000 * 45/48 is 937.5 exactly: half to even gives 938 - 1. numpy's arange meets 937.4999999999999 there.
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(48)
    differences = torch.tensor(trailing_timesteps(VP, 48)) - scheduler.timesteps
    assert differences.abs().max() == 1
    assert differences.nonzero().flatten().tolist() == [3, 15, 27, 39]


@pytest.mark.parametrize(("steps", "sigmas"), [(1, [1]), (2, [1, 0.75]), (4, [1, 0.9, 0.75, 0.5])])
def test_sd3_sigmas_literals(steps: int, sigmas: list[float]) -> None:
    assert [t / 1000 for t in trailing_timesteps(FlowProcess(3.0), steps)] == pytest.approx(sigmas)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 32])
def test_flow_grid_is_that_of_diffusers_for_trailing_sigmas(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=trailing_fractions(steps))
    assert trailing_timesteps(FlowProcess(3.0), steps) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


def test_few_step_grids_are_part_of_the_teachers_grid() -> None:
    # Else the student would be asked at timesteps it never saw.
    for process in (VP, FlowProcess(3.0)):
        for teacher_steps in (16, 32):
            grid = trailing_timesteps(process, teacher_steps)
            for steps in (1, 2, 4):
                assert set(trailing_timesteps(process, steps)) <= set(grid)


def test_a_grid_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        trailing_fractions(0)


# -- the mixture -----------------------------------------------------------------------------------------------------


def test_the_four_phases_weights_are_the_published_ones() -> None:
    assert [phase.modes for phase in PUBLISHED_PHASES] == [
        (0, 0, 0.5, 0.5),
        (0.1, 0.3, 0.3, 0.3),
        (0.25, 0.25, 0.25, 0.25),
        (0.4, 0.2, 0.2, 0.2),
    ]
    assert [phase.adversarial for phase in PUBLISHED_PHASES] == [0, 0.1, 0.2, 0.3]
    assert [phase.dmd for phase in PUBLISHED_PHASES] == [0, 0.3, 0.5, 0.7]
    assert [phase.distillation for phase in PUBLISHED_PHASES] == [1, 1, 1, 1]


# pi(k) for K = 32 by hand. With 2 s^2 = .5 a bell falls from 1 to e^-2 = .135335, e^-8 = 3.3546e-4, e^-18 = 1.5e-8. The
# modes are 8 apart: a mode inside the grid sums to S = 1 + 2 (.135335 + 3.3546e-4 + 1.5e-8) = 1.2713416, and the
# one at k = 0, cut in half by the grid's end, to H = 1 + .135335 + 3.3546e-4 + 1.5e-8 = 1.1356708.
S, H = 1.2713416, 1.1356708
E2, E8 = 0.1353353, 3.354626e-4


@pytest.mark.parametrize(
    ("phase", "k", "probability"),
    [
        (0, 0, 0.0),
        (0, 15, 0.5 * E2 / S),
        (0, 16, 0.5 / S),
        (0, 24, 0.5 / S),
        (0, 26, 0.5 * E8 / S),
        (1, 0, 0.1 / (0.1 * H + 0.9 * S)),
        (1, 1, 0.1 * E2 / (0.1 * H + 0.9 * S)),
        (1, 8, 0.3 / (0.1 * H + 0.9 * S)),
        (2, 0, 0.25 / (0.25 * H + 0.75 * S)),
        (2, 9, 0.25 * E2 / (0.25 * H + 0.75 * S)),
        (3, 0, 0.4 / (0.4 * H + 0.6 * S)),
        (3, 24, 0.2 / (0.4 * H + 0.6 * S)),
    ],
)
def test_mixture_by_hand(phase: int, k: int, probability: float) -> None:
    assert timestep_mixture(32, PUBLISHED_PHASES[phase].modes)[k].item() == pytest.approx(
        probability, rel=1e-5, abs=1e-12
    )


@pytest.mark.parametrize("teacher_steps", [16, 32])
def test_the_modes_are_the_few_step_grid(teacher_steps: int) -> None:
    # The four most likely indices are t = 999, 749, 499, 249.
    mixture = timestep_mixture(teacher_steps, [0.25] * 4)
    grid = trailing_timesteps(VP, teacher_steps)
    assert sorted((grid[k] for k in mixture.topk(4).indices.tolist()), reverse=True) == [999, 749, 499, 249]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    beta=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda beta: sum(beta) > 1e-6),
    multiple=st.integers(1, 16),
)
def test_mixture_is_a_distribution_and_scale_free(beta: list[float], multiple: int) -> None:
    teacher_steps = len(beta) * multiple
    mixture = timestep_mixture(teacher_steps, beta)
    assert mixture.shape == (teacher_steps,)
    assert bool((mixture >= 0).all())
    assert mixture.sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(mixture, timestep_mixture(teacher_steps, [3 * weight for weight in beta]), atol=1e-12)


def test_mixture_refuses_what_it_cannot_place() -> None:
    with pytest.raises(ValueError, match="multiple of the 4 modes"):
        timestep_mixture(30, [0.25] * 4)
    for wrong in ([], [0, 0], [0.5, -0.5, 1, 1]):
        with pytest.raises(ValueError, match="non-negative with a positive sum"):
            timestep_mixture(32, wrong)


# -- denoise snapped -------------------------------------------------------------------------------------------------

few_steps = st.integers(1, MAX_FEW_STEPS)
denoise_values = st.floats(1e-3, 1)


@pytest.mark.parametrize(
    ("steps", "denoise", "timesteps"),
    [
        (4, 1.0, [999, 749, 499, 249]),
        (4, 0.75, [749, 499, 249]),
        (4, 0.5, [499, 249]),
        (4, 0.45, [499, 249]),
        (4, 0.625, [499, 249]),  # halfway: the one nearer the image, which changes less of it
        (3, 0.75, [749, 332]),  # 3 x .75 = 2.25 evaluations are 2
        (4, 0.25, [249]),
        (4, 0.01, [249]),
        (2, 0.5, [499]),
        (2, 0.75, [749, 249]),
        (1, 1.0, [999]),
        (1, 0.5, [499]),
    ],
)
def test_snapped_denoise_by_hand(steps: int, denoise: float, timesteps: list[int]) -> None:
    assert snapped_timesteps(VP, steps, denoise) == timesteps


@settings(deadline=None, derandomize=True)
@given(steps=st.integers(1, 50))
def test_full_denoise_is_the_trailing_grid(steps: int) -> None:
    for process in (VP, FlowProcess(3.0)):
        assert snapped_timesteps(process, steps, 1.0) == trailing_timesteps(process, steps)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(steps=few_steps, denoise=denoise_values)
def test_every_snapped_timestep_was_trained(steps: int, denoise: float) -> None:
    snapped = snapped_timesteps(VP, steps, denoise)
    trained = {*trailing_timesteps(VP, steps), *trailing_timesteps(VP, 4)}
    assert 1 <= len(snapped) <= steps
    assert set(snapped) <= trained
    assert snapped == sorted(set(snapped), reverse=True)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(steps=few_steps, first=denoise_values, second=denoise_values)
def test_more_denoise_never_starts_later_nor_takes_fewer_steps(steps: int, first: float, second: float) -> None:
    weaker, stronger = (snapped_fractions(steps, denoise) for denoise in sorted((first, second)))
    assert weaker[0] <= stronger[0]
    assert len(weaker) <= len(stronger)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(steps=few_steps, denoise=denoise_values)
def test_the_start_is_the_nearest_trained_one(steps: int, denoise: float) -> None:
    trained = {*trailing_fractions(steps), *trailing_fractions(4)}
    assert abs(snapped_fractions(steps, denoise)[0] - denoise) == min(abs(fraction - denoise) for fraction in trained)


@pytest.mark.parametrize("denoise", [0.0, -0.1, 1.01, math.nan])
def test_denoise_outside_its_range_is_refused(denoise: float) -> None:
    with pytest.raises(ValueError, match="denoise must be above 0 and at most 1"):
        snapped_fractions(4, denoise)
