"""Timestep grids, the training mixture and snapped denoise, against figures worked by hand and diffusers."""

from __future__ import annotations

import math
import re

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_diffusion.flash_core.distiller import PUBLISHED_PHASES
from flash_diffusion.flash_core.grid import (
    MAX_FEW_STEPS,
    custom_timesteps,
    implied_shift,
    reference_timesteps,
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
def test_trailing_timesteps_by_hand(steps: int, timesteps: list[int]) -> None:
    assert trailing_timesteps(VP, steps) == timesteps


# diffusers gives numpy 2 a tensor whose __array__ has no 'copy' argument.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("steps", [n for n in range(1, 51) if n != 48])
def test_trailing_grid_equals_diffusers(steps: int) -> None:
    for scheduler in (
        DDIMScheduler(timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    ):
        scheduler.set_timesteps(steps)
        assert trailing_timesteps(VP, steps) == scheduler.timesteps.tolist()


def test_trailing_grid_of_48_steps_differs_from_diffusers_by_a_rounding_tie() -> None:
    # 1000 * 45/48 is 937.5 exactly: half to even gives 938 - 1. numpy's arange gives 937.4999999999999.
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(48)
    differences = torch.tensor(trailing_timesteps(VP, 48)) - scheduler.timesteps
    assert differences.abs().max() == 1
    assert differences.nonzero().flatten().tolist() == [3, 15, 27, 39]


@pytest.mark.parametrize(("steps", "sigmas"), [(1, [1]), (2, [1, 0.75]), (4, [1, 0.9, 0.75, 0.5])])
def test_sd3_sigmas_by_hand(steps: int, sigmas: list[float]) -> None:
    assert [t / 1000 for t in trailing_timesteps(FlowProcess(3.0), steps)] == pytest.approx(sigmas)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 32])
def test_flow_grid_equals_diffusers_with_trailing_sigmas(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=trailing_fractions(steps))
    assert trailing_timesteps(FlowProcess(3.0), steps) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)


def test_the_teachers_grid_contains_the_few_step_grids() -> None:
    # So the student is evaluated only at timesteps of its training.
    for process in (VP, FlowProcess(3.0)):
        for teacher_steps in (16, 32):
            grid = trailing_timesteps(process, teacher_steps)
            for steps in (1, 2, 4):
                assert set(trailing_timesteps(process, steps)) <= set(grid)


def test_0_steps_raise_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        trailing_fractions(0)


# -- the mixture -----------------------------------------------------------------------------------------------------


def test_phases_have_the_published_weights() -> None:
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
def test_the_four_likeliest_timesteps_are_the_4_step_grid(teacher_steps: int) -> None:
    # The four most likely indices are t = 999, 749, 499, 249.
    mixture = timestep_mixture(teacher_steps, [0.25] * 4)
    grid = trailing_timesteps(VP, teacher_steps)
    assert sorted((grid[k] for k in mixture.topk(4).indices.tolist()), reverse=True) == [999, 749, 499, 249]


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    beta=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda beta: sum(beta) > 1e-6),
    multiple=st.integers(1, 16),
)
def test_mixture_is_a_distribution_and_does_not_depend_on_the_scale_of_beta(beta: list[float], multiple: int) -> None:
    teacher_steps = len(beta) * multiple
    mixture = timestep_mixture(teacher_steps, beta)
    assert mixture.shape == (teacher_steps,)
    assert bool((mixture >= 0).all())
    assert mixture.sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(mixture, timestep_mixture(teacher_steps, [3 * weight for weight in beta]), atol=1e-12)


def test_wrong_modes_raise_an_error() -> None:
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
        (4, 0.625, [499, 249]),  # halfway: the lower timestep, which changes less of the image
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
def test_more_denoise_never_starts_later_or_takes_fewer_steps(steps: int, first: float, second: float) -> None:
    weaker, stronger = (snapped_fractions(steps, denoise) for denoise in sorted((first, second)))
    assert weaker[0] <= stronger[0]
    assert len(weaker) <= len(stronger)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(steps=few_steps, denoise=denoise_values)
def test_the_run_starts_at_the_nearest_trained_fraction(steps: int, denoise: float) -> None:
    trained = {*trailing_fractions(steps), *trailing_fractions(4)}
    assert abs(snapped_fractions(steps, denoise)[0] - denoise) == min(abs(fraction - denoise) for fraction in trained)


@pytest.mark.parametrize("denoise", [0.0, -0.1, 1.01, math.nan])
def test_denoise_outside_its_range_raises_an_error(denoise: float) -> None:
    with pytest.raises(ValueError, match="denoise must be above 0 and at most 1"):
        snapped_fractions(4, denoise)


# -- the timesteps of a LoRA -----------------------------------------------------------------------------------------

FLOW = FlowProcess(3.0)
fractions = st.floats(1e-3, 1)


@settings(deadline=None, derandomize=True)
@given(steps=st.integers(1, 50), shift=st.floats(0.2, 12))
def test_fraction_inverts_timestep(steps: int, shift: float) -> None:
    for fraction in trailing_fractions(steps):
        flow = FlowProcess(shift)
        assert flow.fraction(flow.timestep(fraction)) == pytest.approx(fraction)
        assert VP.fraction(VP.timestep(fraction)) == pytest.approx(fraction, abs=6e-4)


@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
@settings(deadline=None, derandomize=True, max_examples=300)
@given(steps=few_steps, hundredths=st.integers(1, 100))
def test_trailing_timesteps_of_a_lora_change_nothing(process, steps: int, hundredths: int) -> None:
    named = {count: trailing_timesteps(process, count) for count in range(1, MAX_FEW_STEPS + 1)}
    without = snapped_timesteps(process, steps, hundredths / 100)
    assert snapped_timesteps(process, steps, hundredths / 100, named) == pytest.approx(without)


@pytest.mark.parametrize(
    ("steps", "denoise", "timesteps"),
    [
        (4, 1.0, [999, 700, 400, 100]),
        (4, 0.99, [999, 700, 400, 100]),
        (4, 0.72, [700, 400, 100]),  # 4 x .701 = 2.8 evaluations are 3
        (4, 0.35, [400, 100]),
        (4, 0.1, [100]),
        (2, 1.0, [999, 400]),
        (2, 0.5, [400]),
        (3, 1.0, [999, 666, 332]),  # 3 steps are not listed: trailing
    ],
)
def test_timesteps_of_a_lora_by_hand(steps: int, denoise: float, timesteps: list[int]) -> None:
    named = {4: (999.0, 700.0, 400.0, 100.0), 2: (999.0, 400.0)}
    assert snapped_timesteps(VP, steps, denoise, named) == timesteps


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15)])
def test_implied_shift_is_the_shift_of_the_trailing_grids(shift: float) -> None:
    grids = {steps: trailing_timesteps(FlowProcess(shift), steps) for steps in (1, 2, 4)}
    assert implied_shift(grids) == pytest.approx(shift)
    rounded = {steps: [round(t) for t in grid] for steps, grid in grids.items()}
    assert implied_shift(rounded) == pytest.approx(shift, rel=0.01)


def test_implied_shift_is_none_without_a_fitting_shift() -> None:
    assert implied_shift({}) is None
    assert implied_shift({1: [1000.0]}) is None  # every shift fits
    assert implied_shift({4: [1000.0, 900.0, 600.0, 500.0]}) is None
    assert implied_shift({4: [1000.0, 900.0, 750.0]}) is None


# -- the published pipelines' timesteps ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 51))
def test_reference_grid_equals_diffusers_lcm_scheduler(steps: int) -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    assert reference_timesteps(VP, steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8, 28])
def test_reference_grid_equals_diffusers_flow_scheduler(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert reference_timesteps(FlowProcess(shift), steps) == pytest.approx(scheduler.timesteps.tolist(), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_reference_grid_with_dynamic_shift_equals_diffusers_flux_pipeline(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy(), mu=1.15)  # as FluxPipeline does
    got = reference_timesteps(FlowProcess(math.exp(1.15)), steps, dynamic_shift=True)
    assert got == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5)


def test_reference_timesteps_by_hand() -> None:
    assert reference_timesteps(VP, 4) == [999, 759, 499, 259]
    assert [round(t) for t in reference_timesteps(FLOW, 4)] == [1000, 858, 602, 9]


@pytest.mark.parametrize("steps", [1, 4, 6, 8])
@pytest.mark.parametrize("denoise", [0.2, 0.25, 0.5, 0.6, 0.75, 0.99, 1.0])
def test_reference_image_to_image_equals_diffusers_pipelines(steps: int, denoise: float) -> None:
    # StableDiffusionImg2ImgPipeline.get_timesteps. Without any timestep the pipeline fails; we keep the last timestep.
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    kept = scheduler.timesteps[max(steps - min(int(steps * denoise), steps), 0) :].tolist()
    assert reference_timesteps(VP, steps, denoise) == (kept or scheduler.timesteps[-1:].tolist())


def test_reference_grid_outside_its_range_raises_an_error() -> None:
    with pytest.raises(ValueError, match="1 to 50 steps, got 51"):
        reference_timesteps(VP, 51)
    with pytest.raises(ValueError, match="denoise must be above 0"):
        reference_timesteps(FLOW, 4, 0.0)


# -- custom timesteps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "text", "denoise", "timesteps"),
    [
        (VP, "999, 749, 499, 249", 1.0, [999, 749, 499, 249]),
        (VP, " 999,0 ", 1.0, [999, 0]),
        (VP, "999.0", 1.0, [999]),
        (VP, "499, 249", 1.0, [499, 249]),  # denoise 1 keeps the whole list
        (VP, "999, 749, 499, 249", 0.5, [499, 249]),
        (VP, "999, 300, 200, 100", 0.3, [300, 200, 100]),
        (VP, "999, 749, 499, 249", 0.01, [249]),
        (VP, "999, 749, 499, 249", 0.875, [749, 499, 249]),  # halfway: the lower timestep
        (FLOW, "1000, 900, 750.5, 500", 1.0, [1000, 900, 750.5, 500]),
        (FLOW, "1000, 900, 750, 500", 0.5, [750, 500]),  # 750 is half of the schedule of shift 3
    ],
)
def test_custom_timesteps_by_hand(process, text: str, denoise: float, timesteps: list[float]) -> None:
    assert custom_timesteps(process, text, denoise) == timesteps


@pytest.mark.parametrize(
    ("process", "text", "message"),
    [
        (VP, "", "is empty. Write whole numbers of 0 to 999"),
        (VP, "  ", "The list of custom timesteps is empty"),
        (VP, "999, 749,", "'' is no timestep of this model"),
        (VP, "999 749", "'999 749' is no timestep"),
        (VP, "1000, 500", "'1000' is no timestep of this model. Write whole numbers of 0 to 999"),
        (VP, "999, -1", "'-1' is no timestep"),
        (VP, "999, 499.5", "'499.5' is no timestep"),
        (VP, "nan", "'nan' is no timestep"),
        (VP, "inf, 3", "'inf' is no timestep"),
        (VP, "999, many", "'many' is no timestep"),
        (VP, "249, 499", "must descend, from noise to image. In '249, 499', 499 comes after 249"),
        (VP, "999, 999", "999 comes after 999"),
        (FLOW, "1000, 0", "'0' is no timestep of this model. Write numbers above 0 and up to 1000"),
        (FLOW, "1001", "'1001' is no timestep"),
    ],
)
def test_wrong_custom_timesteps_raise_a_readable_error(process, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        custom_timesteps(process, text)
