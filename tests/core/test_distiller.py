"""The distillation step: rollouts, gradients, and who gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_diffusion.flash_core import losses
from flash_diffusion.flash_core.denoiser import Conditioning, predict_z0
from flash_diffusion.flash_core.discriminator import Discriminator
from flash_diffusion.flash_core.distiller import (
    ADVERSARIAL_TIMESTEPS,
    PUBLISHED_PHASES,
    Distiller,
    DistillerSettings,
    Phase,
    Rollout,
)
from flash_diffusion.flash_core.grid import timestep_mixture
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess
from flash_diffusion.flash_core.solvers import solve

from .helpers.networks import AdapterDenoiser, ScriptedDenoiser, process_name, processes, tokens

B = 4
EVERYTHING = Phase(modes=(0.25, 0.25, 0.25, 0.25), adversarial=0.3, dmd=0.7)
DISTILLATION = Phase(modes=(0.25, 0.25, 0.25, 0.25))

every_process = pytest.mark.parametrize("process", processes(), ids=process_name)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(batch: int = B, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 4, 6, 6, generator=seeded(seed)).to(dtype)


class ExactDiscriminator(Discriminator):
    """The same heads in double precision, so that difference quotients mean something."""

    def forward(self, features: Any) -> list[Tensor]:
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]


def make_discriminator(dtype: torch.dtype = torch.float32, latents: int = 0) -> Discriminator:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        kind = Discriminator if dtype == torch.float32 else ExactDiscriminator
        return kind([8, 8], hidden=8, latents=latents).to(dtype)


def decode(z: Tensor) -> Tensor:
    """A stand-in decoder: three colours at twice the size."""
    return F.interpolate(torch.tanh(z[:, :3]), scale_factor=2)


def perceptual(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().mean((1, 2, 3))


def make_distiller(
    process: Process | None = None,
    *,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    latent_head: bool = False,
    **settings: Any,
) -> Distiller:
    process = process or VPProcess.from_betas(prediction="v_prediction")
    denoiser = AdapterDenoiser.seeded(process, checkpointing=checkpointing, dtype=dtype)
    options = {"teacher_steps": 8, "guidance": (2.0, 4.0), **settings}
    return Distiller(
        denoiser,
        DistillerSettings(**options),
        discriminator=make_discriminator(dtype, latents=4 if latent_head else 0),
        decode=decode,
        perceptual=perceptual,
    )


def make_rollout(distiller: Distiller, phase: Phase = DISTILLATION, seed: int = 5) -> Rollout:
    dtype = next(distiller.denoiser.parameters()).dtype
    return distiller.rollout(latents(dtype=dtype), tokens(B, 1.0), tokens(B, -1.0), phase, seeded(seed))


def gradients(distiller: Distiller, role: str) -> list[Tensor | None]:
    return [parameter.grad for parameter in distiller.denoiser.adapter(role)]


def untouched(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Return whether no parameter has a gradient; an adapter with gate 0 may hold zeros."""
    return all(parameter.grad is None or not parameter.grad.any() for parameter in parameters)


# -- the rollout -----------------------------------------------------------------------------------------------------


def blank_distiller(process: Process, teacher_steps: int, guidance: tuple[float, float] = (3.0, 13.0)) -> Distiller:
    """A distiller over a denoiser that always answers 0, for statistics over large batches."""
    denoiser = ScriptedDenoiser(process, {"teacher": lambda z, t, c: torch.zeros_like(z)})
    return Distiller(denoiser, DistillerSettings(teacher_steps=teacher_steps, guidance=guidance))


@pytest.mark.parametrize("phase", PUBLISHED_PHASES)
def test_timesteps_are_drawn_from_the_mixture(phase: Phase) -> None:
    distiller, count = blank_distiller(VPProcess.from_betas(), 16), 4000
    rollout = distiller.rollout(torch.zeros(count, 1, 1, 1), tokens(count), tokens(count), phase, seeded(0))
    drawn = torch.tensor([(rollout.t == t).sum().item() for t in distiller.timesteps])
    assert drawn.sum() == count
    expected = timestep_mixture(16, phase.modes) * count
    deviation = 5 * (expected * (1 - expected / count)).sqrt() + 2  # five sigma, and room for the rarest indices
    assert bool(((drawn - expected).abs() <= deviation).all())


def test_guidance_is_uniform_in_its_range_for_each_sample() -> None:
    distiller, count = blank_distiller(VPProcess.from_betas(), 4), 4000
    rollout = distiller.rollout(torch.zeros(count, 1, 1, 1), tokens(count), tokens(count), DISTILLATION, seeded(0))
    assert 3.0 <= rollout.guidance.min().item() < 3.05
    assert 12.95 < rollout.guidance.max().item() <= 13.0
    assert rollout.guidance.mean().item() == pytest.approx(8.0, abs=0.25)
    assert rollout.guidance.unique().numel() > 3900


@every_process
def test_start_latents_are_data_noised_to_their_level_and_pure_noise_at_the_first_index(process: Process) -> None:
    distiller, count = blank_distiller(process, 4), 64
    data = torch.full((count, 4, 16, 16), 20.0)
    rollout = distiller.rollout(data, tokens(count), tokens(count), DISTILLATION, seeded(1))
    assert set(rollout.t.tolist()) == set(distiller.timesteps)
    for sample, t in enumerate(rollout.t.tolist()):
        alpha, sigma = (float(value) for value in process.alpha_sigma(torch.tensor(t)))
        first = t == distiller.timesteps[0]
        assert rollout.z_t[sample].mean().item() == pytest.approx(0 if first else 20 * alpha, abs=0.2)
        assert rollout.z_t[sample].std().item() == pytest.approx(1 if first else sigma, rel=0.1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_teacher_solution_equals_diffusers_solver_with_guidance(prediction: str) -> None:
    # Sample by sample, two separate calls each, DPM-Solver++ started at the sample's own timestep.
    distiller = make_distiller(VPProcess.from_betas(prediction=prediction), teacher_steps=16)
    rollout = make_rollout(distiller)
    assert len(rollout.t.unique()) > 1
    for row in range(B):
        scheduler = DPMSolverMultistepScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=prediction,
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(16)
        begin = scheduler.timesteps.tolist().index(int(rollout.t[row]))
        scheduler.set_begin_index(begin)
        z = rollout.z_t[[row]]
        with torch.no_grad(), distiller.denoiser.role("teacher"):
            for t in scheduler.timesteps[begin:]:
                positive = distiller.denoiser.predict(z, t[None], tokens(1, 1.0))
                negative = distiller.denoiser.predict(z, t[None], tokens(1, -1.0))
                z = scheduler.step(negative + rollout.guidance[row] * (positive - negative), t, z).prev_sample
        assert torch.allclose(rollout.z_teacher[[row]], z, rtol=1e-4, atol=1e-4)


def test_rollout_depends_only_on_its_generator() -> None:
    distiller = make_distiller()
    first = make_rollout(distiller, seed=3)
    torch.manual_seed(999)
    again, other = make_rollout(distiller, seed=3), make_rollout(distiller, seed=4)
    assert torch.equal(first.z_teacher, again.z_teacher)
    assert torch.equal(first.guidance, again.guidance)
    assert not torch.equal(first.z_teacher, other.z_teacher)
    assert not first.z_teacher.requires_grad


# -- trajectories ----------------------------------------------------------------------------------------------------


def test_trajectory_keeps_the_states_of_likely_starts() -> None:
    # Around each mode of the K = 32 grid, the neighbours that hold more than a thousandth of the mixture.
    distiller = blank_distiller(VPProcess.from_betas(), 32)
    trajectory = distiller.trajectory(latents(), tokens(B), tokens(B), seeded(0))
    assert trajectory.indices == (0, 1, 7, 8, 9, 15, 16, 17, 23, 24, 25)
    assert trajectory.states.shape == (11, B, 4, 6, 6)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_a_trajectory_is_the_guided_teachers_path_from_pure_noise(solver: Any) -> None:
    distiller = make_distiller(teacher_steps=16, solver=solver)
    data = 100 * latents()
    trajectory = distiller.trajectory(data, tokens(B, 1.0), tokens(B, -1.0), seeded(0))
    assert trajectory.indices[0] == 0
    assert trajectory.states[0].abs().max().item() < 6  # pure noise, without data
    expected = distiller.teacher_solution(trajectory.states[0], tokens(B, 1.0), tokens(B, -1.0), trajectory.guidance)
    assert torch.equal(trajectory.z_teacher, expected)
    if solver == "ddim":  # a first-order path can be taken up again anywhere
        for position, index in enumerate(trajectory.indices):
            resumed = distiller.teacher_solution(
                trajectory.states[position], tokens(B, 1.0), tokens(B, -1.0), trajectory.guidance, [index] * B
            )
            assert torch.allclose(resumed, trajectory.z_teacher, atol=1e-4)


@pytest.mark.parametrize("phase", PUBLISHED_PHASES)
def test_replay_starts_each_sample_at_its_own_recorded_index(phase: Phase) -> None:
    distiller, count = make_distiller(teacher_steps=16), 256
    data = torch.randn(count, 4, 2, 2, generator=seeded(2))
    trajectory = distiller.trajectory(data, tokens(count, 1.0), tokens(count, -1.0), seeded(0))
    rollout = distiller.replay(trajectory, phase, seeded(1))
    recorded = {distiller.timesteps[index]: trajectory.states[at] for at, index in enumerate(trajectory.indices)}
    for sample, t in enumerate(rollout.t.tolist()):
        assert torch.equal(rollout.z_t[sample], recorded[t][sample])
    assert torch.equal(rollout.z_teacher, trajectory.z_teacher)
    assert torch.equal(rollout.guidance, trajectory.guidance)
    modes = [distiller.timesteps[index] for index in (0, 4, 8, 12)]
    for mode, weight in zip(modes, phase.modes, strict=True):
        assert (mode in rollout.t) == (weight > 0)


def test_rows_of_a_trajectory_are_the_same_samples_throughout() -> None:
    distiller = make_distiller()
    trajectory = distiller.trajectory(latents(), tokens(B, 1.0), tokens(B, -1.0), seeded(0))
    rows = trajectory.rows(torch.tensor([2, 0]))
    assert rows.indices == trajectory.indices
    assert torch.equal(rows.states, trajectory.states[:, [2, 0]])
    for name in ("z_teacher", "z0", "guidance"):
        assert torch.equal(getattr(rows, name), getattr(trajectory, name)[[2, 0]])
    assert len(rows.conditioning) == len(rows.unconditional) == 2
    assert distiller.replay(rows, DISTILLATION, seeded(0)).z_t.shape == (2, 4, 6, 6)


# -- the student's output --------------------------------------------------------------------------------------------


@every_process
def test_student_output_is_the_boundary_scaled_clean_prediction(process: Process) -> None:
    distiller = make_distiller(process)
    z_t, t = latents(), torch.tensor([990.0, 499.0, 2.0, 1.0])
    rollout = Rollout(z_t, t, z_t, z_t, torch.ones(B), tokens(B), tokens(B))
    z0_hat = predict_z0(distiller.denoiser, z_t, t, tokens(B))
    if isinstance(process, FlowProcess):
        expected = z0_hat
    else:
        s = (10 * t)[:, None, None, None]
        expected = 0.25 / (s**2 + 0.25) * z_t + s / (s**2 + 0.25).sqrt() * z0_hat
    assert torch.allclose(distiller.student_output(rollout), expected, rtol=1e-5, atol=1e-6)


def test_student_output_near_the_image_is_its_input() -> None:
    distiller, z_t = make_distiller(), latents()
    rollout = Rollout(z_t, torch.zeros(B), z_t, z_t, torch.ones(B), tokens(B), tokens(B))
    assert torch.equal(distiller.student_output(rollout), z_t)


# -- the student's gradient against difference quotients -------------------------------------------------------------


def slope(distiller: Distiller, loss: Callable[[], float], direction: list[Tensor], step: float) -> float:
    """``d loss`` along a direction of the student's parameters, by central differences."""
    values = []
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for parameter, change in zip(distiller.denoiser.adapter("student"), direction, strict=True):
                parameter += sign * step * change
            values.append(loss())
            for parameter, change in zip(distiller.denoiser.adapter("student"), direction, strict=True):
                parameter -= sign * step * change
    return (values[0] - values[1]) / (2 * step)


def check_gradient(distiller: Distiller, phase: Phase, step: float = 1e-5, tolerance: float = 1e-5) -> None:
    rollout = make_rollout(distiller, phase)

    def loss() -> float:
        with torch.enable_grad():
            return distiller.student_step(rollout, phase, seeded(9)).terms["total"].item()

    loss()
    got = [parameter.grad.clone() for parameter in distiller.denoiser.adapter("student")]
    for trial in range(3):
        draw = seeded(100 + trial)
        direction = [torch.randn(g.shape, generator=draw, dtype=g.dtype) for g in got]
        expected = slope(distiller, loss, direction, step)
        assert abs(expected) > 1e-6
        along = sum((g * d).sum().item() for g, d in zip(got, direction, strict=True))
        assert along == pytest.approx(expected, rel=tolerance)


@every_process
def test_gradients_of_distillation_and_adversarial_terms_equal_finite_differences(process: Process) -> None:
    distiller = make_distiller(process, dtype=torch.float64)
    check_gradient(distiller, Phase(modes=(0.25,) * 4, adversarial=0.8))


@pytest.mark.parametrize("distillation", ["mse", "l1", "pseudo_huber", "lpips"])
def test_gradient_of_every_distance_equals_finite_differences(distillation: Any) -> None:
    distiller = make_distiller(dtype=torch.float64, distillation=distillation, perceptual_crop=3)
    check_gradient(distiller, DISTILLATION, step=1e-7, tolerance=1e-4)


@pytest.mark.parametrize("adversarial", ["lsgan", "hinge", "non_saturating", "wgan", "vanilla"])
@pytest.mark.parametrize("latent_head", [False, True])
def test_gradient_of_every_adversarial_loss_equals_finite_differences(adversarial: Any, latent_head: bool) -> None:
    distiller = make_distiller(dtype=torch.float64, adversarial=adversarial, latent_head=latent_head)
    check_gradient(distiller, Phase(modes=(0.25,) * 4, distillation=0.0, adversarial=1.0))


@pytest.mark.parametrize("fake_score", ["student", "critic"])
@every_process
def test_gradient_of_distribution_matching_equals_its_formula(process: Process, fake_score: Any) -> None:
    """The gradient is ``J^T (2 w g / n)`` with g at the denoiser's noise levels; the scores have no gradient."""
    distiller = make_distiller(process, dtype=torch.float64, fake_score=fake_score)
    denoiser, rollout = distiller.denoiser, make_rollout(distiller)
    asked: list[tuple[str, Tensor, Tensor]] = []
    predict = denoiser.predict

    def recording(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        asked.append((denoiser._role, z_t.detach(), t))
        return predict(z_t, t, conditioning)

    denoiser.predict = recording
    phase = Phase(modes=(0.25,) * 4, distillation=0.0, dmd=1.0)
    step = distiller.student_step(rollout, phase, seeded(9))
    denoiser.predict = predict
    got = [parameter.grad.clone() for parameter in denoiser.adapter("student")]

    assert [role for role, _, _ in asked] == ["student", "teacher", fake_score]
    (_, _, _), (_, doubled, t_doubled), (_, z_t, t) = asked
    assert torch.equal(doubled, torch.cat([z_t, z_t]))
    assert torch.equal(t_doubled, torch.cat([t, t]))
    with torch.no_grad(), denoiser.role("teacher"):
        positive = predict_z0(denoiser, z_t, t, rollout.conditioning)
        negative = predict_z0(denoiser, z_t, t, rollout.unconditional)
        real = negative + rollout.guidance[:, None, None, None] * (positive - negative)
    with torch.no_grad(), denoiser.role(fake_score):
        fake = predict_z0(denoiser, z_t, t, rollout.conditioning)
    with denoiser.role("student"):
        z_student = distiller.student_output(rollout)
    weight = 1 / ((z_student - real).abs().mean((1, 2, 3), keepdim=True) + 1e-5)
    direction = (2 * weight * (fake - real) / z_student.numel()).detach()
    expected = torch.autograd.grad(z_student, denoiser.adapter("student"), direction)
    assert sum(g.abs().sum().item() for g in expected) > 1e-6
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-12)
    assert step.terms["dmd"].item() == pytest.approx((weight * (fake - real)).square().mean().item(), rel=1e-6)


# -- who gets a gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake_score", ["student", "critic"])
def test_student_step_trains_only_the_students_adapter(fake_score: Any) -> None:
    distiller = make_distiller(fake_score=fake_score)
    rollout = make_rollout(distiller)
    step = distiller.student_step(rollout, EVERYTHING, seeded(0))
    trained = set(distiller.denoiser.adapter("student"))
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    others = [parameter for parameter in distiller.denoiser.parameters() if parameter not in trained]
    assert untouched([*others, *distiller.discriminator.parameters()])
    assert not step.z_student.requires_grad
    assert all(not term.requires_grad for term in step.terms.values())


@pytest.mark.parametrize("r1", [0.0, 0.5])
def test_discriminator_step_trains_only_its_heads(r1: float) -> None:
    distiller = make_distiller(r1=r1)
    rollout = make_rollout(distiller)
    terms = distiller.discriminator_step(rollout, latents(seed=8), seeded(0))
    shown = {"discriminator", "discriminator_accuracy", "discriminator_real", "discriminator_fake"}
    assert set(terms) == shown | ({"r1"} if r1 else set())
    assert all(parameter.grad is not None for parameter in distiller.discriminator.parameters())
    assert untouched(distiller.denoiser.parameters())


@pytest.mark.parametrize(
    ("adversarial", "asked", "latent_head"),
    [("hinge", 1, False), ("relativistic", 0, False), ("relativistic", 0, True)],
)
def test_the_heads_learn_from_what_the_students_loss_has_seen(
    adversarial: Any, asked: int, latent_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of the same levels and noise asked anew, for fewer of the teacher's passes."""
    distiller = make_distiller(adversarial=adversarial, latent_head=latent_head)
    rollout, phase = make_rollout(distiller), Phase((1, 1, 1, 1), adversarial=1.0)
    step = distiller.student_step(rollout, phase, seeded(0))
    assert step.seen is not None
    features, batches = distiller.denoiser.features, list[int]()

    def counted(z_t: Tensor, *others: Any) -> list[Tensor]:
        batches.append(len(z_t))
        return features(z_t, *others)

    monkeypatch.setattr(distiller.denoiser, "features", counted)
    distiller.discriminator_step(rollout, step.z_student, seeded(1), seen=step.seen)
    shared = [parameter.grad.clone() for parameter in distiller.discriminator.parameters()]
    assert sum(batches) == asked * B
    distiller.discriminator.zero_grad()
    draws = (step.seen.t, step.seen.noise)
    monkeypatch.setattr("flash_diffusion.flash_core.terms.adversarial.draw_renoising", lambda *_: draws)
    distiller.discriminator_step(rollout, step.z_student, seeded(1))
    for one, parameter in zip(shared, distiller.discriminator.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-5, rtol=1e-4)


def test_r1_adds_half_its_weight_times_the_penaltys_gradient() -> None:
    def grads(r1: float) -> list[Tensor]:
        distiller = make_distiller(r1=r1)
        distiller.discriminator_step(make_rollout(distiller), latents(seed=8), seeded(0))
        return [parameter.grad for parameter in distiller.discriminator.parameters()]

    # The penalty by itself, on the features that the step showed to the heads: the first half of the batch is real.
    distiller = make_distiller()
    features = distiller.denoiser.features
    shown: list[Tensor] = []
    distiller.denoiser.features = lambda *asked: shown.extend(features(*asked)) or shown
    distiller.discriminator_step(make_rollout(distiller), latents(seed=8), seeded(0))
    real = [feature[:B].detach().requires_grad_() for feature in shown]
    parameters = list(distiller.discriminator.parameters())
    penalty = losses.r1_penalty(distiller.discriminator(real), real)
    expected = torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)
    assert sum(gradient.abs().sum().item() for gradient in expected) > 1e-4
    for without, with_r1, gradient in zip(grads(0.0), grads(3.0), expected, strict=True):
        assert torch.allclose(with_r1 - without, 1.5 * gradient, atol=1e-5 * (1 + with_r1.abs().max().item()))


@every_process
def test_the_critic_step_trains_the_critics_adapter_on_the_students_samples(process: Process) -> None:
    distiller = make_distiller(process)
    denoiser, rollout, z_student = distiller.denoiser, make_rollout(distiller), latents(seed=8)
    asked: list[tuple[str, Tensor, Tensor]] = []
    predict = denoiser.predict

    def recording(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        asked.append((denoiser._role, z_t, t))
        return predict(z_t, t, conditioning)

    denoiser.predict = recording
    terms = distiller.critic_step(z_student, rollout.conditioning, seeded(0))
    denoiser.predict = predict
    trained = set(denoiser.adapter("critic"))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert untouched(parameter for parameter in denoiser.parameters() if parameter not in trained)
    # The loss by the process's definition: the noise is computed from the critic's input.
    ((role, z_t, t),) = asked
    assert role == "critic"
    alpha, sigma = (value[:, None, None, None] for value in process.alpha_sigma(t))
    noise = (z_t - alpha * z_student) / sigma
    with torch.no_grad(), denoiser.role("critic"):
        expected = F.mse_loss(denoiser.predict(z_t, t, rollout.conditioning), process.target(z_student, noise, t))
    assert terms["critic"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("real", ["data", "teacher"])
def test_real_samples_follow_the_settings(real: Any) -> None:
    shown: list[Tensor] = []
    distiller = make_distiller(real=real)
    features = distiller.denoiser.features

    def recording(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        shown.append(z_t)
        return features(z_t, t, conditioning)

    distiller.denoiser.features = recording
    rollout, fake = make_rollout(distiller), latents(seed=8)
    wanted = rollout.z0 if real == "data" else rollout.z_teacher
    distiller.discriminator_step(rollout, fake, seeded(0))
    (z_t,) = shown
    # Both halves share noise and level, so their difference is alpha (real - fake), sample by sample.
    difference = (z_t[:B] - z_t[B:]).flatten(1)
    expected = (wanted - fake).flatten(1)
    assert torch.allclose(F.cosine_similarity(difference, expected), torch.ones(B), atol=1e-4)


# -- sums and scales -------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_and_each_term_is_computed_once() -> None:
    distiller = make_distiller()
    rollout = make_rollout(distiller)
    phase = Phase(modes=(0.25,) * 4, distillation=0.5, adversarial=0.3, dmd=0.7)
    terms = distiller.student_step(rollout, phase, seeded(0)).terms
    assert set(terms) == {"distillation", "adversarial", "dmd", "total"}
    expected = 0.5 * terms["distillation"] + 0.3 * terms["adversarial"] + 0.7 * terms["dmd"]
    assert terms["total"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_factors_and_scale_multiply_the_gradient_and_calls_accumulate() -> None:
    def grads(phase: Phase, scale: float = 1.0, calls: int = 1) -> list[Tensor]:
        distiller = make_distiller()
        rollout = make_rollout(distiller)
        for _ in range(calls):
            distiller.student_step(rollout, phase, seeded(0), scale)
        return [parameter.grad for parameter in distiller.denoiser.adapter("student")]

    once = grads(EVERYTHING)
    for other in (grads(EVERYTHING, scale=0.25, calls=4), grads(EVERYTHING, scale=1.0)):
        for one, two in zip(once, other, strict=True):
            assert torch.allclose(one, two, atol=1e-6)
    for one, two in zip(
        grads(Phase((0.25,) * 4, distillation=3.0)), grads(Phase((0.25,) * 4, distillation=1.0)), strict=True
    ):
        assert torch.allclose(one, 3 * two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step", ["discriminator_step", "critic_step"])
def test_scale_multiplies_discriminator_and_critic_gradients(step: str) -> None:
    def grads(scale: float) -> list[Tensor]:
        distiller = make_distiller()
        rollout, z_student = make_rollout(distiller), latents(seed=8)
        if step == "critic_step":
            distiller.critic_step(z_student, rollout.conditioning, seeded(0), scale)
        else:
            distiller.discriminator_step(rollout, z_student, seeded(0), scale)
        owners = distiller.discriminator.parameters() if "disc" in step else distiller.denoiser.adapter("critic")
        return [parameter.grad for parameter in owners]

    for one, two in zip(grads(1.0), grads(0.5), strict=True):
        assert torch.allclose(one, 2 * two, rtol=1e-4, atol=1e-7)


def test_steps_restore_the_role() -> None:
    distiller = make_distiller(fake_score="critic")
    rollout = make_rollout(distiller)
    for role in ("student", "teacher", "critic"):
        with distiller.denoiser.role(role):
            distiller.student_step(rollout, EVERYTHING, seeded(0))
            distiller.discriminator_step(rollout, latents(), seeded(0))
            distiller.critic_step(latents(), rollout.conditioning, seeded(0))
            make_rollout(distiller)
            assert distiller.denoiser._role == role


# -- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake_score", ["student", "critic"])
@every_process
def test_checkpointing_changes_no_gradient(process: Process, fake_score: Any) -> None:
    def grads(checkpointing: bool) -> dict[str, list[Tensor]]:
        distiller = make_distiller(process, checkpointing=checkpointing, fake_score=fake_score)
        rollout = make_rollout(distiller)
        step = distiller.student_step(rollout, EVERYTHING, seeded(0))
        assert untouched(distiller.denoiser.adapter("critic"))
        distiller.discriminator_step(rollout, step.z_student, seeded(1))
        distiller.critic_step(step.z_student, rollout.conditioning, seeded(2))
        return {
            "student": gradients(distiller, "student"),
            "critic": gradients(distiller, "critic"),
            "discriminator": [parameter.grad for parameter in distiller.discriminator.parameters()],
        }

    plain, recomputed = grads(False), grads(True)
    for owner, expected in plain.items():
        assert sum(grad.abs().sum().item() for grad in expected) > 1e-6
        for one, two in zip(recomputed[owner], expected, strict=True):
            assert torch.equal(one, two)


def test_split_backward_equals_one_backward() -> None:
    """Without checkpointing a single backward pass through everything is right: the split one must equal it."""
    phase = Phase(modes=(0.25,) * 4, adversarial=0.8)
    distiller = make_distiller(dtype=torch.float64)
    denoiser, rollout = distiller.denoiser, make_rollout(distiller)
    shown: list[tuple[Tensor, Tensor]] = []
    features = denoiser.features

    def recording(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        shown.append((z_t.detach(), t))
        return features(z_t, t, conditioning)

    denoiser.features = recording
    step = distiller.student_step(rollout, phase, seeded(0))
    split = [parameter.grad.clone() for parameter in denoiser.adapter("student")]

    denoiser.zero_grad()
    ((renoised, t),) = shown
    with denoiser.role("student"):
        z_student = distiller.student_output(rollout)
    assert torch.equal(z_student, step.z_student)
    alpha = denoiser.process.alpha_sigma(t)[0][:, None, None, None]
    with denoiser.role("teacher"):
        logits = distiller.discriminator(features(renoised + alpha * (z_student - step.z_student), t, tokens(B)))
    adversarial = sum(((map_ - 1) ** 2).mean() for map_ in logits) / len(logits)
    (F.mse_loss(z_student, rollout.z_teacher) + 0.8 * adversarial).backward()
    for one, parameter in zip(split, denoiser.adapter("student"), strict=True):
        assert torch.allclose(one, parameter.grad, rtol=1e-9, atol=1e-14)


def test_a_decoder_that_checkpoints_is_safe_too() -> None:
    def grads(recompute: bool) -> list[Tensor]:
        distiller = make_distiller(distillation="lpips", perceptual_crop=3, checkpointing=recompute)
        if recompute:
            distiller.decode = lambda z: checkpoint(decode, z, use_reentrant=False)
        distiller.student_step(make_rollout(distiller), DISTILLATION, seeded(0))
        return gradients(distiller, "student")

    for one, two in zip(grads(True), grads(False), strict=True):
        assert torch.equal(one, two)


# -- refusals and defaults -------------------------------------------------------------------------------------------


def test_missing_parts_raise_an_error_that_names_them() -> None:
    process = VPProcess.from_betas()
    denoiser = AdapterDenoiser.seeded(process)
    with pytest.raises(ValueError, match="pass decode= and perceptual="):
        Distiller(denoiser, DistillerSettings(distillation="lpips"))
    distiller = Distiller(denoiser, DistillerSettings(teacher_steps=8))
    rollout = make_rollout(distiller)
    with pytest.raises(ValueError, match="no discriminator: pass discriminator="):
        distiller.student_step(rollout, Phase((0.25,) * 4, adversarial=0.1), seeded(0))
    with pytest.raises(ValueError, match="no discriminator: pass discriminator="):
        distiller.discriminator_step(rollout, rollout.z0, seeded(0))


def test_defaults_are_the_papers_for_sd15() -> None:
    settings = DistillerSettings()
    assert settings.teacher_steps == 32
    assert settings.guidance == (3.0, 13.0)
    assert settings.solver == "dpmpp_2m"
    assert settings.adversarial == "lsgan"
    assert settings.fake_score == "student"
    assert ADVERSARIAL_TIMESTEPS == (10, 250, 500, 750)


def test_flow_model_trains_with_every_step() -> None:
    """A flow teacher with Euler, from the first draw to the last update."""
    distiller = make_distiller(FlowProcess(3.0), solver="euler", fake_score="critic")
    rollout = make_rollout(distiller)
    expected = solve(
        lambda z, t, rows: rollout.z_teacher[rows], distiller.denoiser.process, rollout.z_t, distiller.timesteps
    )
    assert torch.allclose(expected, rollout.z_teacher, atol=1e-5)
    step = distiller.student_step(rollout, EVERYTHING, seeded(0))
    assert torch.isfinite(step.terms["total"])
    assert distiller.critic_step(step.z_student, rollout.conditioning, seeded(0))["critic"].item() > 0


def test_a_step_tells_how_hard_each_term_pulls_and_how_the_outputs_drift() -> None:
    """For MSE alone the pull is |2 (z - z_teacher) / N| times the factor; contrast and error by their definitions."""
    distiller = make_distiller()
    rollout = make_rollout(distiller)
    step = distiller.student_step(rollout, Phase((1.0,), distillation=3.0), seeded(0))
    difference = step.z_student - rollout.z_teacher
    assert set(step.figures) >= {"pull_distillation", "student_contrast", "teacher_contrast", "student_error"}
    assert step.figures["pull_distillation"].item() == pytest.approx(
        3 * 2 * difference.norm().item() / difference.numel()
    )
    assert step.figures["student_error"].item() == pytest.approx(difference.square().mean().sqrt().item())
    spread = rollout.z_teacher.var((2, 3), correction=0).sqrt().mean().item()
    assert step.figures["teacher_contrast"].item() == pytest.approx(spread)
    both = distiller.student_step(rollout, EVERYTHING, seeded(0)).figures
    assert {"pull_distillation", "pull_adversarial", "pull_dmd"} <= set(both)
