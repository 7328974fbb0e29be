"""One test per mistake found in public implementations of the method: ours must not make them.

Where it is cheap, a test also makes the mistake itself, to show that it would be seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.discriminator import Discriminator
from flash_diffusion.flash_core.distiller import PUBLISHED_PHASES, Distiller, DistillerSettings, Phase, Rollout
from flash_diffusion.flash_core.losses import perceptual_loss, random_crops
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess

from .helpers.networks import AdapterDenoiser, Call, ScriptedDenoiser, process_name, processes, tokens

B, LEVEL = 32, 50.0  # a flat latent this bright shows alpha as its mean and sigma as its spread
EVERYTHING = Phase(modes=(0.25, 0.25, 0.25, 0.25), adversarial=0.3, dmd=0.7)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

every_process = pytest.mark.parametrize("process", processes(), ids=process_name)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return torch.full_like(z_t, LEVEL).requires_grad_()


def scripted(process: Process, **settings: Any) -> tuple[ScriptedDenoiser, Distiller]:
    denoiser = ScriptedDenoiser(process, {"teacher": flat, "student": flat, "critic": flat})
    options = {"teacher_steps": 8, **settings}
    torch.manual_seed(0)
    return denoiser, Distiller(denoiser, DistillerSettings(**options), discriminator=Discriminator([4], hidden=8))


def flat_rollout(t: float, batch: int = B) -> Rollout:
    data = torch.full((batch, 4, 24, 24), LEVEL)
    noise = torch.randn(data.shape, generator=seeded(1))
    return Rollout(noise, torch.full((batch,), t), data, data, torch.ones(batch), tokens(batch, 1.0), tokens(batch, -1))


# -- re-noising through a solver that falls back to its last grid index for timesteps off the grid -------------------


def true_level(process: Process, t: float) -> tuple[float, float]:
    """``(alpha, sigma)`` by somebody else: diffusers' table for VP, the definition for flow."""
    if isinstance(process, FlowProcess):
        return 1 - t / 1000, t / 1000
    bar = DDPMScheduler(**BETAS).alphas_cumprod[round(t)].item()
    return bar**0.5, (1 - bar) ** 0.5


def levels_are_true(process: Process, call: Call) -> bool:
    for z_t, t in zip(call.z_t, call.t.tolist(), strict=True):
        alpha, sigma = true_level(process, t)
        if abs(z_t.mean().item() / LEVEL - alpha) > 3e-3 or abs(z_t.std().item() - sigma) > 0.08 * sigma + 1e-3:
            return False
    return True


@pytest.mark.parametrize("process", [VPProcess.from_betas(), FlowProcess(3.0)], ids=process_name)
@pytest.mark.parametrize("term", ["adversarial", "discriminator", "dmd", "critic"])
def test_renoising_off_the_grid_is_at_the_true_level(process: Process, term: str) -> None:
    denoiser, distiller = scripted(process, fake_score="critic")
    rollout = flat_rollout(distiller.timesteps[0])
    if term == "discriminator":
        distiller.discriminator_step(rollout, rollout.z0, seeded(2))
        (call,) = denoiser.called("features")
    elif term == "critic":
        # The flat critic has no weights, so the loss has no gradient. Only the call matters here.
        distiller.critic_step(rollout.z0, rollout.conditioning, seeded(2))
        (call,) = denoiser.called("predict", "critic")
    elif term == "adversarial":
        distiller.student_step(rollout, Phase((1.0,), distillation=0, adversarial=1.0), seeded(2))
        (call,) = denoiser.called("features")
    else:
        distiller.student_step(rollout, Phase((1.0,), distillation=0, dmd=1.0), seeded(2))
        (call,) = denoiser.called("predict", "critic")
    assert levels_are_true(process, call)
    fractions = (10, 250, 500, 750)
    if term in ("adversarial", "discriminator"):
        on_schedule = {process.uniform_timestep(torch.tensor(f)).item() for f in fractions}
        assert set(call.t.tolist()) == on_schedule
    else:
        assert len(call.t.unique()) > B // 2  # anywhere in 0..999, one for each sample
    assert not set(call.t.tolist()) <= set(distiller.timesteps)


def test_a_solvers_own_add_noise_would_have_been_caught() -> None:
    scheduler = DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(32)
    z0, t = torch.full((4, 4, 24, 24), LEVEL), torch.tensor([10, 250, 500, 750])
    z_t = scheduler.add_noise(z0, torch.randn(z0.shape, generator=seeded(0)), t)
    assert not levels_are_true(VPProcess.from_betas(), Call("features", "teacher", z_t, t, tokens(4)))
    fallen_back_to = true_level(VPProcess.from_betas(), scheduler.timesteps[-1].item())[0]
    assert (z_t.mean((1, 2, 3)) / LEVEL).tolist() == pytest.approx([fallen_back_to] * 4, abs=3e-3)


# -- a forward per optimiser: the rollout paid twice -----------------------------------------------------------------


def test_one_rollout_serves_student_discriminator_and_critic() -> None:
    denoiser, distiller = scripted(VPProcess.from_betas(), fake_score="critic")
    data = torch.zeros(B, 4, 6, 6)
    rollout = distiller.rollout(data, tokens(B, 1.0), tokens(B, -1.0), EVERYTHING, seeded(0))
    starts = [distiller.timesteps.index(t) for t in rollout.t.tolist()]
    # One batched call for each grid point from the earliest start on: cond and uncond of the started samples.
    assert len(denoiser.called("predict", "teacher")) == 8 - min(starts)
    assert sum(len(call.t) for call in denoiser.calls) == 2 * sum(8 - start for start in starts)
    denoiser.calls.clear()
    step = distiller.student_step(rollout, EVERYTHING, seeded(1))
    distiller.discriminator_step(rollout, step.z_student, seeded(2))
    distiller.critic_step(step.z_student, rollout.conditioning, seeded(3))
    assert [(call.kind, call.role, len(call.t)) for call in denoiser.calls] == [
        ("predict", "student", B),  # the student's only forward pass
        ("features", "teacher", B),  # adversarial
        ("predict", "teacher", 2 * B),  # real score, guided
        ("predict", "critic", B),  # fake score
        ("features", "teacher", 2 * B),  # the discriminator's real and fake
        ("predict", "critic", B),  # the critic's own update
    ]


# -- cond and uncond in two calls, one k and one w for the whole batch -----------------------------------------------


def test_both_branches_travel_in_one_call_and_every_sample_has_its_own_k_and_w() -> None:
    denoiser, distiller = scripted(VPProcess.from_betas())
    batch = 16
    condition = Conditioning(vector=torch.arange(1.0, batch + 1)[:, None])
    rollout = distiller.rollout(torch.zeros(batch, 4, 6, 6), condition, tokens(batch, -1.0), EVERYTHING, seeded(0))
    assert len(rollout.t.unique()) >= 4
    assert len(rollout.guidance.unique()) == batch
    for call in denoiser.calls:
        first, second = call.z_t.chunk(2)
        positive, negative = call.conditioning.vector.chunk(2)
        assert torch.equal(first, second)
        assert bool((negative == -1).all())
        joined = rollout.t >= call.t[0]
        assert torch.equal(positive, condition.vector[joined])


# -- LPIPS on a fixed centre crop ------------------------------------------------------------------------------------


def test_random_crops_reach_every_corner() -> None:
    latents = torch.zeros(400, 1, 16, 16, requires_grad=True)
    (crops,) = random_crops(seeded(0), 8, latents)
    crops.sum().backward()
    covered = latents.grad.sum((0, 1))
    assert bool((covered > 0).all())
    assert bool((covered[4:12, 4:12] > 0.2 * 400).all())
    centre = torch.zeros(16, 16)
    centre[4:12, 4:12] = 1
    assert centre.mean().item() == 0.25  # the share that the mistake would train


def test_the_perceptual_gradient_reaches_every_pixel_over_time() -> None:
    prediction, target = torch.randn(64, 3, 16, 16, requires_grad=True), torch.randn(64, 3, 16, 16)
    generator = seeded(0)
    for _ in range(8):
        perceptual_loss(
            lambda a, b: (a - b).square().mean((1, 2, 3)), lambda z: z, prediction, target, 8, generator
        ).backward()
    assert bool((prediction.grad.abs().sum((0, 1)) > 0).all())


# -- epsilon hard-coded ----------------------------------------------------------------------------------------------


@every_process
def test_every_prediction_type_is_understood(process: Process) -> None:
    """A network that knows the answer, in its own parametrisation, must come out as the answer everywhere."""
    answer = torch.randn(8, 4, 5, 5, generator=seeded(3))

    def oracle(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return answer[conditioning.vector[:, 0].long()]

    denoiser = ScriptedDenoiser(process, {"teacher": oracle, "student": oracle, "critic": oracle})
    distiller = Distiller(denoiser, DistillerSettings(teacher_steps=8, fake_score="critic"))
    condition = Conditioning(vector=torch.arange(8.0)[:, None])
    rollout = distiller.rollout(answer, condition, condition, EVERYTHING, seeded(0))
    assert torch.allclose(rollout.z_teacher, answer, atol=1e-4)
    with denoiser.role("student"):
        assert torch.allclose(distiller.student_output(rollout), answer, atol=1e-4)
    # A critic that predicts the student's samples exactly has loss 0, in every parametrisation.
    denoiser._z0["critic"] = lambda z, t, c: oracle(z, t, c).clone().requires_grad_()
    assert distiller.critic_step(answer, rollout.conditioning, seeded(1))["critic"].item() < 1e-6


# -- features that are the final prediction --------------------------------------------------------------------------


def test_the_discriminator_sees_hidden_states_never_the_prediction() -> None:
    denoiser, distiller = scripted(VPProcess.from_betas())
    rollout = flat_rollout(999)
    distiller.student_step(rollout, Phase((1.0,), distillation=0, adversarial=1.0), seeded(0))
    distiller.discriminator_step(rollout, rollout.z0, seeded(1))
    assert [call.role for call in denoiser.called("features")] == ["teacher", "teacher"]
    assert denoiser.called("predict", "teacher") == []


# -- zero-weight losses computed anyway in warm-up -------------------------------------------------------------------


def test_terms_of_weight_zero_are_not_computed() -> None:
    denoiser, distiller = scripted(VPProcess.from_betas())
    terms = distiller.student_step(flat_rollout(999), PUBLISHED_PHASES[0], seeded(0)).terms
    assert set(terms) == {"distillation", "total"}
    assert [(call.kind, call.role) for call in denoiser.calls] == [("predict", "student")]
    denoiser.calls.clear()
    terms = distiller.student_step(flat_rollout(999), Phase((1.0,), distillation=0, dmd=0.5), seeded(0)).terms
    assert set(terms) == {"dmd", "total"}
    assert denoiser.called("features") == []


def test_warm_up_needs_no_discriminator() -> None:
    denoiser = ScriptedDenoiser(VPProcess.from_betas(), {"teacher": flat, "student": flat})
    distiller = Distiller(denoiser, DistillerSettings(teacher_steps=8))
    assert set(distiller.student_step(flat_rollout(999), PUBLISHED_PHASES[0], seeded(0)).terms) == {
        "distillation",
        "total",
    }


# -- real and fake under different noise -----------------------------------------------------------------------------


@every_process
def test_real_and_fake_share_noise_and_timestep(process: Process) -> None:
    denoiser, distiller = scripted(process)
    rollout = flat_rollout(distiller.timesteps[0], batch=8)
    fake = torch.randn(8, 4, 24, 24, generator=seeded(5))
    distiller.discriminator_step(rollout, fake, seeded(0))
    (call,) = denoiser.called("features")
    assert call.role == "teacher"
    real_t, fake_t = call.t.chunk(2)
    assert torch.equal(real_t, fake_t)
    alpha, _ = (value[:, None, None, None] for value in process.alpha_sigma(real_t))
    real_z, fake_z = call.z_t.chunk(2)
    assert torch.allclose(real_z - alpha * rollout.z_teacher, fake_z - alpha * fake, atol=1e-4)
    assert len(call.t.unique()) > 1


# -- phase weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PUBLISHED_PHASES)
def test_each_phase_weighs_its_terms(phase: Phase) -> None:
    _, distiller = scripted(VPProcess.from_betas())
    rollout = flat_rollout(999)
    terms = distiller.student_step(rollout, phase, seeded(0)).terms
    expected = terms["distillation"].item()
    if phase.adversarial:
        expected += phase.adversarial * terms["adversarial"].item() + phase.dmd * terms["dmd"].item()
    assert terms["total"].item() == pytest.approx(expected, rel=1e-6)


# -- distribution matching without guidance on the real score, or with it on the fake one ----------------------------


def test_the_real_score_is_guided_and_the_fake_one_is_not() -> None:
    denoiser, distiller = scripted(VPProcess.from_betas(), fake_score="critic")
    distiller.student_step(flat_rollout(999), Phase((1.0,), distillation=0, dmd=1.0), seeded(0))
    (real,), (fake,) = denoiser.called("predict", "teacher"), denoiser.called("predict", "critic")
    assert torch.equal(real.z_t, torch.cat([fake.z_t, fake.z_t]))  # both scores at one and the same point
    assert torch.equal(real.t, torch.cat([fake.t, fake.t]))
    assert torch.equal(real.conditioning.vector, torch.cat([torch.ones(B, 1), -torch.ones(B, 1)]))
    assert torch.equal(fake.conditioning.vector, torch.ones(B, 1))


# -- gradient checkpointing with adapter toggling --------------------------------------------------------------------


def test_one_backward_through_checkpoints_would_be_wrong_and_ours_is_not() -> None:
    """Recomputation uses the adapters of THEN: a plain ``loss.backward()`` later is silently wrong."""

    def distiller_of(checkpointing: bool) -> tuple[Distiller, Rollout]:
        denoiser = AdapterDenoiser.seeded(VPProcess.from_betas(prediction="v_prediction"), checkpointing=checkpointing)
        distiller = Distiller(denoiser, DistillerSettings(teacher_steps=8))
        data = torch.randn(4, 4, 6, 6, generator=seeded(0))
        return distiller, distiller.rollout(data, tokens(4), tokens(4, -1.0), EVERYTHING, seeded(1))

    def naive(checkpointing: bool) -> list[Tensor]:
        distiller, rollout = distiller_of(checkpointing)
        with distiller.denoiser.role("student"):
            z_student = distiller.student_output(rollout)
        F.mse_loss(z_student, rollout.z_teacher).backward()
        return [parameter.grad for parameter in distiller.denoiser.adapter("student")]

    def ours(checkpointing: bool) -> list[Tensor]:
        distiller, rollout = distiller_of(checkpointing)
        distiller.student_step(rollout, Phase((1.0,)), seeded(2))
        return [parameter.grad for parameter in distiller.denoiser.adapter("student")]

    right, wrong = naive(checkpointing=False), naive(checkpointing=True)
    norm = sum(grad.square().sum() for grad in right).sqrt()
    error = sum((one - two).square().sum() for one, two in zip(wrong, right, strict=True)).sqrt()
    assert error / norm > 0.05  # no exception was raised
    for checkpointing in (False, True):
        for one, two in zip(ours(checkpointing), right, strict=True):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-8)
