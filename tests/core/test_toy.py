"""The whole method on a toy: two moons with an exact teacher, distilled in seconds, measured by energy distance.

The claims are coarse on purpose: a wrong sign, level or role anywhere in the step turns them over, a new seed does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_diffusion.flash_core.discriminator import Discriminator
from flash_diffusion.flash_core.distiller import PUBLISHED_PHASES, Distiller, DistillerSettings, Phase
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess
from flash_diffusion.flash_core.solvers import solve

from .helpers.toy import TwoMoons, conditions, data, draw, energy_distance

COUNT, BATCH = 2000, 128
EVEN = (0.25, 0.25, 0.25, 0.25)
V_PREDICTION = VPProcess.from_betas(prediction="v_prediction")

# A CFG-guided score (w = 2) is not the score of any distribution, so distribution matching overshoots the teacher.
# Unguided, all three loss terms have the same goal, so one test can use them together.
GUIDED, UNGUIDED = (2.0, 2.0), (1.0, 1.0)


def distil(
    process: Process,
    phases: Sequence[Phase],
    updates: int,
    *,
    recorded: bool = False,
    learning_rate: float = 2e-3,
    **settings: Any,
) -> TwoMoons:
    """Run the real distiller for ``updates`` updates a phase and return the denoiser with its trained adapters."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    denoiser = TwoMoons(process)
    discriminator = Discriminator(denoiser.feature_channels, hidden=32)
    settings = {"teacher_steps": 8, "guidance": GUIDED, **settings}
    distiller = Distiller(denoiser, DistillerSettings(**settings), discriminator=discriminator)
    student = torch.optim.Adam(denoiser.adapters["student"].parameters(), learning_rate)
    critic = torch.optim.Adam(denoiser.adapters["critic"].parameters(), learning_rate)
    heads = torch.optim.Adam(discriminator.parameters(), learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(student, 1.0, 0.0, updates * len(phases))
    size = 4096 if recorded else BATCH
    condition, unconditional = conditions(size)
    trajectory = distiller.trajectory(data(size, generator), condition, unconditional, generator) if recorded else None
    for phase in phases:
        for _ in range(updates):
            if trajectory is None:
                rollout = distiller.rollout(data(BATCH, generator), condition, unconditional, phase, generator)
            else:
                rows = torch.randint(size, (BATCH,), generator=generator)
                rollout = distiller.replay(trajectory.rows(rows), phase, generator)
            for optimiser in (student, critic, heads):
                optimiser.zero_grad()
            step = distiller.student_step(rollout, phase, generator)
            if phase.adversarial:
                distiller.discriminator_step(rollout, step.z_student, generator)
                heads.step()
            if phase.dmd and distiller.settings.fake_score == "critic":
                distiller.critic_step(step.z_student, rollout.conditioning, generator)
                critic.step()
            student.step()
            decay.step()
    return denoiser


def teacher_samples(process: Process, guidance: float, steps: int = 64) -> Tensor:
    """(COUNT, 2) samples of the guided teacher's ODE in many steps, by guidance written out anew."""
    denoiser, (condition, unconditional) = TwoMoons(process), conditions(COUNT)
    z = torch.randn(COUNT, 2, 1, 1, generator=torch.Generator().manual_seed(77))

    def predict(z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        positive = denoiser.predict(z, t, condition.rows(rows))
        negative = denoiser.predict(z, t, unconditional.rows(rows))
        return process.z0_from_output(z, negative + guidance * (positive - negative), t)

    with torch.no_grad():
        return solve(predict, process, z, trailing_timesteps(process, steps), solver="ddim").flatten(1)


def distances(denoiser: TwoMoons, reference: Tensor) -> dict[int, tuple[float, float]]:
    """For 1, 2 and 4 steps: the energy distance of the undistilled model, at its better sampler, and the student's."""
    table = {}
    for steps in (1, 2, 4):
        before = min(
            energy_distance(draw(denoiser, "teacher", steps, COUNT, 3, stochasticity), reference)
            for stochasticity in (0.0, 1.0)
        )
        table[steps] = before, energy_distance(draw(denoiser, "student", steps, COUNT, 3), reference)
    return table


def test_the_toys_teacher_is_exact() -> None:
    # Its unguided ODE ends in the data's own distribution, and its few steps without distillation do not.
    generator = torch.Generator().manual_seed(1)
    real, more = data(COUNT, generator).flatten(1), data(COUNT, generator).flatten(1)
    floor = abs(energy_distance(real, more))
    for process in (V_PREDICTION, FlowProcess(3.0)):
        assert energy_distance(teacher_samples(process, 1.0), real) < floor + 0.01
        assert energy_distance(draw(TwoMoons(process), "teacher", 1, COUNT, 3), real) > 0.4


@pytest.mark.parametrize(
    ("process", "solver", "learning_rate"),
    # An epsilon adapter is heard 15 times louder at t = 999 (1 / alpha) than elsewhere; so Adam needs longer strides.
    [(VPProcess.from_betas(), "dpmpp_2m", 4e-3), (V_PREDICTION, "ddim", 2e-3), (FlowProcess(3.0), "euler", 2e-3)],
    ids=["vp-epsilon", "vp-v_prediction", "flow"],
)
def test_distillation_puts_the_guided_teacher_into_few_unguided_steps(
    process: Process, solver: Any, learning_rate: float
) -> None:
    student = distil(process, [Phase(EVEN)], 400, solver=solver, learning_rate=learning_rate)
    for before, after in distances(student, teacher_samples(process, 2.0)).values():
        assert after < 0.25 * before


def test_recorded_trajectories_teach_as_well() -> None:
    student = distil(V_PREDICTION, [Phase(EVEN)], 400, recorded=True)
    for before, after in distances(student, teacher_samples(V_PREDICTION, 2.0)).values():
        assert after < 0.2 * before


@pytest.mark.parametrize(
    ("process", "settings"),
    [
        (V_PREDICTION, {"fake_score": "critic", "real": "data", "r1": 0.01}),
        (FlowProcess(3.0), {"fake_score": "student", "solver": "euler", "adversarial": "hinge"}),
    ],
    ids=["vp-critic", "flow-student"],
)
def test_all_three_terms_together_through_the_published_phases(process: Process, settings: dict[str, Any]) -> None:
    student = distil(process, PUBLISHED_PHASES, 80, guidance=UNGUIDED, **settings)
    table = distances(student, teacher_samples(process, 1.0))
    for steps, share in ((1, 0.25), (2, 0.4), (4, 0.75)):  # four steps are not bad to begin with, on so easy a picture
        before, after = table[steps]
        assert after < share * before


@pytest.mark.parametrize(
    ("phase", "settings"),
    [
        (Phase(EVEN, distillation=0.0, adversarial=1.0), {}),
        (Phase(EVEN, distillation=0.0, dmd=1.0), {"fake_score": "critic"}),
    ],
    ids=["adversarial", "dmd"],
)
def test_each_term_alone_pulls_the_right_way(phase: Phase, settings: dict[str, Any]) -> None:
    student = distil(V_PREDICTION, [phase], 250, recorded=True, guidance=UNGUIDED, **settings)
    before, after = distances(student, teacher_samples(V_PREDICTION, 1.0))[1]
    assert after < 0.7 * before
