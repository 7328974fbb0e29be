"""TDM and intra-segment guidance: the steps of a run, by worked values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_diffusion.flash_core import losses
from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings, DmdSettings, Phase, Rollout, StartStates
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess, broadcast
from flash_diffusion.flash_core.terms import distribution_matching
from flash_diffusion.flash_core.terms.segments import (
    diffused_from_segment_end,
    inner_point,
    intra_segment_term,
    levels_at,
    segment_ends,
    step_to,
)

from .helpers.networks import AdapterDenoiser, ScriptedDenoiser, process_name, tokens

PROCESSES = [
    VPProcess.from_betas(prediction="v_prediction", zero_terminal_snr=True),
    VPProcess.from_betas(),
    FlowProcess(3.0),
]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=process_name)
FRACTIONS = (1.0, 0.75, 0.5, 0.25)
ALONG = DmdSettings(form="trajectory", loss="pseudo_huber")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_rollout(process: Process, guidance: float = 3.0, size: int = 4) -> Rollout:
    """One sample at each timestep of a run of 4 steps."""
    z = torch.randn(4, 4, size, size, generator=seeded(3))
    t = torch.tensor([process.timestep(fraction) for fraction in FRACTIONS])
    return Rollout(z, t, z + 1, z - 1, torch.full((4,), guidance), tokens(4, 1.0), tokens(4, -1.0))


def constants(process: Process, student: float = 0.0, critic: float = 0.0) -> ScriptedDenoiser:
    """Clean predictions that are constants: 2 with the condition, 1 without, and the student's and the critic's."""

    def teacher(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.where(broadcast(conditioning.vector[:, 0] > 0, z_t), 2.0, 1.0).expand_as(z_t)

    return ScriptedDenoiser(
        process,
        {
            "teacher": teacher,
            "student": lambda z_t, t, c: torch.full_like(z_t, student),
            "critic": lambda z_t, t, c: torch.full_like(z_t, critic),
        },
    )


@each_process
def test_segments_lead_from_each_timestep_to_the_next(process: Process) -> None:
    rollout = run_rollout(process)
    ends = segment_ends(process, rollout.starts, 4)
    assert ends == pytest.approx([0.75, 0.5, 0.25, 0], abs=1e-6)
    t, alpha, sigma = levels_at(process, ends, rollout.z_t)
    assert t[:3].tolist() == pytest.approx(rollout.t[1:].tolist(), abs=1e-3)
    assert (alpha[3].item(), sigma[3].item()) == (1, 0)
    # A step with the true data and noise keeps both.
    data, noise = torch.randn(4, 4, 4, 4, generator=seeded(0)), torch.randn(4, 4, 4, 4, generator=seeded(1))
    z_t = process.add_noise(data, noise, rollout.t)
    torch.testing.assert_close(step_to(process, z_t, rollout.t, data, alpha, sigma), alpha * data + sigma * noise)


@each_process
def test_states_are_diffused_on_from_the_end_of_the_segment(process: Process) -> None:
    """x_tau = alpha_tau z + sigma_tau (unit noise): of the state's own noise and of fresh noise, as much as fits."""
    rollout = run_rollout(process, size=64)
    student = torch.full_like(rollout.z_t, 0.5)
    alpha_t, sigma_t = (broadcast(value, student) for value in process.alpha_sigma(rollout.t))
    own = torch.randn(student.shape, generator=seeded(8))
    rollout = replace(rollout, z_t=alpha_t * student + sigma_t * own)
    levels = []
    for seed in range(40):
        z_tau, t = diffused_from_segment_end(process, student, rollout, 4, (20, 979), seeded(seed))
        alpha, sigma = (broadcast(value, student) for value in process.alpha_sigma(t))
        noise = (z_tau - alpha * student) / sigma
        assert noise.flatten(1).std(1).tolist() == pytest.approx([1.0] * 4, abs=0.04)
        # Its share of the noise that the state had: a sigma' / sigma_tau.
        ends = levels_at(process, segment_ends(process, rollout.starts, 4), student)
        kept = (alpha / ends[1] * ends[2] / sigma).flatten()
        correlation = (noise * own).flatten(1).mean(1)
        assert correlation.tolist() == pytest.approx(kept.tolist(), abs=0.04)
        levels.append([process.fraction(value) for value in t.tolist()])
    lowest = torch.tensor(levels).amin(0).tolist()
    for level, bound in zip(lowest, (0.75, 0.5, 0.25, 0.02), strict=True):
        assert bound - 1e-3 <= level <= bound + 0.15
    assert 0.9 < max(max(row) for row in levels) <= 0.981


@each_process
def test_tdm_by_hand(process: Process) -> None:
    """Constant scores: g = F - R - (w - 1) (R - R_empty), n = mean |z - R_cfg|, pseudo-Huber over n."""
    rollout = run_rollout(process)
    settings = DistillerSettings(32, guidance=(3, 3), fake_score="critic", dmd=ALONG)
    z = torch.full((4, 4, 4, 4), 0.5, requires_grad=True)
    real, fake = distribution_matching.real_and_fake(constants(process, critic=-1.0), settings, z, rollout, seeded(0))
    torch.testing.assert_close(real, torch.full_like(real, 1 + 3 * (2 - 1)), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(fake, torch.full_like(fake, -1.0), atol=2e-3, rtol=1e-3)
    loss = losses.distribution_matching_loss(z, real, fake, "pseudo_huber")
    n = 4 - 0.5 + 1e-5
    assert loss.item() == pytest.approx((((-1 - 4) ** 2 + 1e-6) ** 0.5 - 1e-3) / n, rel=2e-3)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.flatten()[0].item() == pytest.approx(-1 / n / z.numel(), rel=2e-3)  # nearly the sign, over n
    same, _ = distribution_matching.real_and_fake(constants(process), settings, z, rollout, seeded(0))
    (zero,) = torch.autograd.grad(losses.distribution_matching_loss(z, same, same, "pseudo_huber"), z)
    assert not zero.any()


@each_process
def test_the_critic_of_tdm_learns_the_students_output_at_the_states_of_the_term(process: Process) -> None:
    distiller = Distiller(AdapterDenoiser.seeded(process), DistillerSettings(8, fake_score="critic", dmd=ALONG))
    rollout, z = run_rollout(process), torch.randn(4, 4, 4, 4, generator=seeded(5))
    asked: list[tuple[Tensor, Tensor]] = []
    predict = distiller.denoiser.predict
    distiller.denoiser.predict = lambda z_t, t, c: asked.append((z_t, t)) or predict(z_t, t, c)
    loss = distiller.critic_step(z, rollout.conditioning, seeded(0), 1.0, rollout)["critic"]
    ((z_tau, t),) = asked
    expected = diffused_from_segment_end(process, z, rollout, 4, (20, 979), seeded(0))
    assert torch.equal(z_tau, expected[0])
    output = process.output_from_z0(z_tau, z, t)  # the output that says: this state's clean latent is z
    with torch.no_grad(), distiller.denoiser.role("critic"):
        wanted = (predict(z_tau, t, rollout.conditioning) - output).square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    with pytest.raises(ValueError, match="needs rollout="):
        distiller.critic_step(z, rollout.conditioning, seeded(0))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_points_inside_a_segment_keep_off_its_ends(share: float) -> None:
    assert inner_point(1.0, 0.75, share) == pytest.approx(0.77 + share * 0.21)
    assert 0.6 < inner_point(0.61, 0.6, share) < 0.61


@each_process
def test_intra_segment_guidance_by_hand(process: Process) -> None:
    """The teacher says A = 4 (guided), the student B; by way of the teacher the noise changes, and so does the end."""
    rollout, z = run_rollout(process), torch.full((4, 4, 4, 4), 0.5, requires_grad=True)
    denoiser = constants(process, student=-1.0)
    source = Distiller(denoiser, DistillerSettings(8))
    term = intra_segment_term(source, z, rollout, 4, seeded(0))
    (call,) = denoiser.called("predict", "student")
    _, alpha_end, sigma_end = levels_at(process, segment_ends(process, rollout.starts, 4), z)
    alpha, sigma = (broadcast(value, z) for value in process.alpha_sigma(rollout.t))
    alpha_mid, sigma_mid = (broadcast(value, z) for value in process.alpha_sigma(call.t))
    assert bool((call.t < rollout.t).all())
    by_teacher = alpha_mid * 4 + sigma_mid * (rollout.z_t - alpha * 4) / sigma
    torch.testing.assert_close(call.z_t, by_teacher, atol=1e-3, rtol=1e-3)
    wanted = alpha_end * -1 + sigma_end * (by_teacher + alpha_mid) / sigma_mid
    direct = alpha_end * 0.5 + sigma_end * (rollout.z_t - alpha * 0.5) / sigma
    expected = (((direct - wanted) ** 2 + 1e-6).sqrt() - 1e-3).mean()
    assert term.item() == pytest.approx(expected.item(), rel=5e-3)
    # Where teacher and student agree there is nothing to learn.
    agreed = torch.full_like(z, 4.0).requires_grad_()
    source = Distiller(constants(process, student=4.0), DistillerSettings(8))
    assert intra_segment_term(source, agreed, rollout, 4, seeded(0)).item() < 1e-3


@each_process
def test_a_step_of_tdm_asks_the_teacher_for_no_solution_and_reads_no_data(process: Process) -> None:
    states = StartStates(student=1.0, stochasticity=0.0, steps=(4,))
    solver: Any = "euler" if isinstance(process, FlowProcess) else "dpmpp_2m"
    settings = DistillerSettings(32, solver, (3, 3), fake_score="critic", dmd=ALONG, states=states)
    distiller, phase = (
        Distiller(AdapterDenoiser.seeded(process), settings),
        Phase((1, 1, 1, 1), dmd=1.0, distillation=0),
    )
    distiller.teacher_solution = None  # type: ignore[assignment, method-assign]
    empty = torch.full((32, 4, 3, 3), float("nan"))
    rollout = distiller.rollout(empty, tokens(32, 1.0), tokens(32, -1.0), phase, seeded(0))
    assert {round(process.fraction(t), 4) for t in rollout.t.tolist()} == set(FRACTIONS)
    assert rollout.z_t.isfinite().all()
    step = distiller.student_step(rollout, phase, seeded(1))
    assert step.terms["dmd"].isfinite()
    assert any(parameter.grad.abs().sum() > 0 for parameter in distiller.denoiser.adapter("student"))
