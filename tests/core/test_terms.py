"""The options of the loss terms, by worked values: Gaussian data, whose scores are known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_diffusion.flash_core import losses
from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.flash_core.discriminator import Discriminator
from flash_diffusion.flash_core.distiller import Distiller, DistillerSettings, DmdSettings, Phase, Rollout
from flash_diffusion.flash_core.process import FlowProcess, Process, VPProcess, broadcast
from flash_diffusion.flash_core.terms import distribution_matching
from flash_diffusion.flash_core.terms.adversarial import pair_accuracy
from flash_diffusion.flash_core.terms.draws import acting_rows
from flash_diffusion.flash_core.terms.features import feature_matching_term

from .helpers.networks import AdapterDenoiser, ScriptedDenoiser, process_name, tokens

B = 6
SPREAD, MEAN, EMPTY_MEAN, FAKE_MEAN = 0.5, 2.0, 1.5, -1.0
ONE_OF_EACH = [VPProcess.from_betas(), VPProcess.from_betas(prediction="v_prediction"), FlowProcess(3.0)]
one_of_each = pytest.mark.parametrize("process", ONE_OF_EACH, ids=process_name)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def posterior(process: Process, mean: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """E[z0 | z_t] of data N(mean, SPREAD^2): the exact clean prediction."""
    alpha, sigma = (broadcast(value, z_t) for value in process.alpha_sigma(t))
    share = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    return mean + share * (z_t - alpha * mean)


def gaussians(process: Process, fake_mean: float = FAKE_MEAN) -> ScriptedDenoiser:
    """Exact denoisers of Gaussian data: the teacher's mean depends on the condition, the critic's is ``fake_mean``."""

    def real(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with_condition = broadcast(conditioning.vector[:, 0] > 0, z_t)
        return posterior(process, torch.where(with_condition, MEAN, EMPTY_MEAN), z_t, t)

    def fake(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return posterior(process, torch.tensor(fake_mean), z_t, t)

    return ScriptedDenoiser(process, {"teacher": real, "critic": fake, "student": real})


def rollout_at(process: Process, fraction: float, guidance: float = 3.0, batch: int = B) -> Rollout:
    z = torch.randn(batch, 4, 3, 3, generator=seeded(3))
    t = torch.full((batch,), process.timestep(fraction))
    return Rollout(z, t, z + 1, z - 1, torch.full((batch,), guidance), tokens(batch, 1.0), tokens(batch, -1.0))


# -- distribution matching -------------------------------------------------------------------------------------------


@one_of_each
def test_decoupled_scores_of_gaussian_data_equal_their_formula(process: Process) -> None:
    """real - fake = share_DM (mean - fake mean) + (w - 1) share_CA (mean - empty mean), at the drawn levels."""
    denoiser, rollout = gaussians(process), rollout_at(process, 0.5)
    settings = DistillerSettings(fake_score="critic", dmd=DmdSettings(form="decoupled"))
    z = torch.randn(B, 4, 3, 3, generator=seeded(1))
    real, fake = distribution_matching.real_and_fake(denoiser, settings, z, rollout, seeded(0))
    (three,), (critic,) = denoiser.called("predict", "teacher"), denoiser.called("predict", "critic")
    t_matching, t_guidance, again = three.t.chunk(3)
    assert torch.equal(t_guidance, again)
    assert torch.equal(critic.t, t_matching)
    assert bool((t_guidance < rollout.t).all())
    assert len(t_matching.unique()) > 3
    noises = []
    for place, t in ((0, t_matching), (B, t_guidance)):
        alpha, sigma = (broadcast(value, z) for value in process.alpha_sigma(t))
        noises.append((three.z_t[place : place + B] - alpha * z) / sigma)
    assert abs(torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))[0, 1].item()) < 0.3

    def share(t: Tensor) -> Tensor:  # what a mean moves the prediction by: 1 - alpha^2 s^2 / (alpha^2 s^2 + sigma^2)
        alpha, sigma = process.alpha_sigma(t)
        return broadcast(sigma**2 / (alpha**2 * SPREAD**2 + sigma**2), z)

    expected = share(t_matching) * (MEAN - FAKE_MEAN) + 2 * share(t_guidance) * (MEAN - EMPTY_MEAN)
    torch.testing.assert_close(real - fake, expected.expand_as(z), atol=2e-4, rtol=1e-4)


@one_of_each
def test_decoupled_equals_plain_at_one_noise_level_and_where_the_guidance_is_1(process: Process) -> None:
    rollout, z = rollout_at(process, 1.0, guidance=1.0), torch.randn(B, 4, 3, 3, generator=seeded(1))
    results = []
    for form in ("plain", "decoupled"):
        settings = DistillerSettings(fake_score="critic", dmd=DmdSettings(form=form, timesteps=(20, 979)))
        real, fake = distribution_matching.real_and_fake(gaussians(process), settings, z, rollout, seeded(0))
        results.append((real, fake))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    # One level: R(c) + (w - 1) (R(c) - R(empty)) is the guided prediction.
    level = torch.full((B,), process.timestep(0.4))
    denoiser, guided = gaussians(process), replace(rollout, guidance=torch.full((B,), 4.0))
    both = distribution_matching._decoupled(
        denoiser, z, z, level, replace(guided, t=level), guided.guidance, 20, seeded(0)
    )
    (call,) = denoiser.called("predict")
    plain = posterior(process, torch.tensor(MEAN), z, level)
    extra = posterior(process, torch.tensor(MEAN), call.z_t[B : 2 * B], call.t[B : 2 * B])
    extra = extra - posterior(process, torch.tensor(EMPTY_MEAN), call.z_t[B : 2 * B], call.t[B : 2 * B])
    torch.testing.assert_close(both, plain + 3 * extra, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dmd", [{"guidance": 1.0}, {"form": "decoupled"}, {}], ids=["unguided", "decoupled", "plain"])
def test_no_gradient_where_the_students_distribution_is_the_teachers(dmd: dict[str, Any]) -> None:
    """With an exact critic of the same Gaussian, and no guidance, the two scores are the same everywhere."""
    process = ONE_OF_EACH[0]
    denoiser = gaussians(process, fake_mean=MEAN)
    settings = DistillerSettings(fake_score="critic", dmd=DmdSettings(**dmd))
    rollout = rollout_at(process, 1.0, guidance=1.0)
    z = torch.randn(B, 4, 3, 3, generator=seeded(1), requires_grad=True)
    real, fake = distribution_matching.real_and_fake(denoiser, settings, z, rollout, seeded(0))
    (gradient,) = torch.autograd.grad(losses.distribution_matching_loss(z, real, fake), z)
    assert gradient.abs().max().item() < 1e-5
    asked = denoiser.called("predict", "teacher")
    assert [len(call.t) // B for call in asked] == [1 if dmd.get("guidance") else 3 if dmd else 2]


@one_of_each
def test_guidance_levels_are_uniform_below_the_start(process: Process) -> None:
    starts = torch.tensor([process.timestep(fraction) for fraction in (1.0, 0.5, 0.25, 0.02, 0.01)]).repeat(400)
    tau = distribution_matching.cleaner_times(gaussians(process), starts.tolist(), 20, seeded(0)).reshape(400, 5)
    assert tau.min().item() == 20
    for column, top in enumerate((999, 499, 249)):
        assert top - 12 < tau[:, column].max().item() < top
        assert tau[:, column].float().mean().item() == pytest.approx((20 + top) / 2, rel=0.1)
    assert tau[:, 3:].unique().tolist() == [20]  # nothing is cleaner: the lowest level


# -- samples on which a term acts ------------------------------------------------------------------------------------


@one_of_each
def test_first_step_samples_start_at_pure_noise_or_beside_it(process: Process) -> None:
    t = torch.tensor([process.timestep(fraction) for fraction in (1.0, 0.75, 31 / 32, 0.9, 0.25, 0.905)])
    assert acting_rows("first_step", process, t.tolist()).tolist() == [0, 2, 5]
    assert acting_rows("all", process, t.tolist()) is None


def make_distiller(**settings: Any) -> Distiller:
    denoiser = AdapterDenoiser.seeded(VPProcess.from_betas())
    with torch.random.fork_rng():
        torch.manual_seed(11)
        discriminator = Discriminator([8, 8], hidden=8)
    return Distiller(denoiser, DistillerSettings(teacher_steps=8, **settings), discriminator=discriminator)


def mixed_rollout(first: list[bool]) -> Rollout:
    rollout = rollout_at(VPProcess.from_betas(), 1.0, batch=len(first))
    return replace(rollout, t=torch.tensor([999.0 if row else 499.0 for row in first]))


def output_gradient(distiller: Distiller, rollout: Rollout, phase: Phase) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient of the loss in the student's output, and the terms."""
    held: list[Tensor] = []
    output = distiller.student_output

    def watched(given: Rollout) -> Tensor:
        z = output(given)
        z.register_hook(lambda gradient: held.append(gradient.clone()))
        return z

    distiller.student_output = watched  # type: ignore[method-assign]
    terms = distiller.student_step(rollout, phase, seeded(0)).terms
    return held[0], terms


@pytest.mark.parametrize("term", ["adversarial", "dmd", "feature_matching"])
def test_a_term_of_the_first_step_acts_on_no_other_sample(term: str) -> None:
    options = {
        "adversarial": {"adversarial_rows": "first_step"},
        "dmd": {"dmd": DmdSettings(rows="first_step")},
        "feature_matching": {"feature_rows": "first_step"},
    }[term]
    phase = Phase((1, 1, 1, 1), distillation=0.0, **{term: 1.0})
    first = [True, False, False, True, False]
    gradient, terms = output_gradient(make_distiller(**options), mixed_rollout(first), phase)
    assert [bool(row.any()) for row in gradient] == first
    assert term in terms
    # Without such a sample the term is not computed, and neither are discriminator and critic taught.
    distiller, none = make_distiller(**options), mixed_rollout([False] * 3)
    gradient, terms = output_gradient(distiller, none, phase)
    assert set(terms) == {"total"}
    assert not gradient.any()
    if term == "adversarial":
        assert distiller.discriminator_step(none, none.z0, seeded(0)) == {}
    elif term == "dmd":
        assert len(distiller.critic_samples(none, none.z0, seeded(0))[0]) == 0
        z, rollout, _ = distiller.critic_samples(
            mixed_rollout(first), torch.arange(5.0)[:, None, None, None], seeded(0)
        )
        assert z.flatten().tolist() == [0, 3]
        assert len(rollout.conditioning) == 2


def test_distillation_of_the_first_step_has_its_own_factor() -> None:
    first, plain_phase = [True, False, True], Phase((1, 1, 1, 1))
    plain, _ = output_gradient(make_distiller(), mixed_rollout(first), plain_phase)
    phase = Phase((1, 1, 1, 1), first_step_distillation=0.2)
    weighted, _ = output_gradient(make_distiller(), mixed_rollout(first), phase)
    factors = torch.tensor([0.2, 1.0, 0.2])[:, None, None, None]
    torch.testing.assert_close(weighted, factors * plain, atol=1e-7, rtol=1e-4)


# -- distillation ----------------------------------------------------------------------------------------------------


def test_weights_by_timestep_are_distances_of_other_predictions() -> None:
    """min-SNR's weight of epsilon is min(SNR, 5) / SNR; velocities are v predictions, or a flow's outputs."""
    first, second, z_t = (torch.randn(4, 4, 3, 3, generator=seeded(seed)).double() for seed in range(3))
    t = torch.tensor([999.0, 749.0, 249.0, 30.0])

    def distance(process: Process) -> Tensor:
        outputs = [process.output_from_z0(z_t, z0, t) for z0 in (first, second)]
        return (outputs[0] - outputs[1]).square().mean((1, 2, 3))

    epsilon, velocity = VPProcess.from_betas(), VPProcess.from_betas(prediction="v_prediction")
    alpha, sigma = epsilon.alpha_sigma(t)
    snr = (alpha / sigma).square()
    assert snr[0] < 0.01 < 5 < snr[3]
    cases = [
        ("min_snr", epsilon, distance(epsilon) * snr.clamp_max(5) / snr),
        ("velocity", velocity, distance(velocity)),
        ("velocity", FlowProcess(3.0), distance(FlowProcess(3.0))),
    ]
    for kind, process, expected in cases:
        weight = losses.timestep_weight(kind, process, t)
        got = [losses.latent_loss("mse", first[[row]], second[[row]], weight[[row]]).item() for row in range(4)]
        assert got == pytest.approx(expected.tolist(), rel=1e-4)


def test_weights_multiply_each_samples_own_distance() -> None:
    first, second = (torch.randn(3, 4, 3, 3, generator=seeded(seed)) for seed in range(2))
    weight = torch.tensor([0.0, 1.0, 3.0])
    for kind in ("mse", "l1", "pseudo_huber"):
        alone = [losses.latent_loss(kind, first[[row]], second[[row]]).item() for row in range(3)]
        expected = (alone[1] + 3 * alone[2]) / 3
        assert losses.latent_loss(kind, first, second, weight).item() == pytest.approx(expected, rel=1e-5)
    crops = (lambda z: z[:, :3], first, second, 3, seeded(0))
    each = losses.perceptual_loss(lambda a, b: (a - b).square().mean((1, 2, 3)), *crops, weight)
    expected = (weight * (first - second)[:, :3].square().mean((1, 2, 3))).mean()
    assert each.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"a perceptual distance of each sample, shape \(3,\); got \(\)"):
        losses.perceptual_loss(lambda a, b: (a - b).square().mean(), *crops, weight)


def test_the_steps_distillation_has_the_weight_of_its_timestep() -> None:
    rollout = mixed_rollout([True, False])
    gradients = {
        kind: output_gradient(make_distiller(distillation_weighting=kind), rollout, Phase((1, 1, 1, 1)))[0]
        for kind in ("uniform", "velocity")
    }
    sigma = VPProcess.from_betas().alpha_sigma(rollout.t)[1]
    expected = gradients["uniform"] / broadcast(sigma.square(), rollout.z_t)
    torch.testing.assert_close(gradients["velocity"], expected, atol=1e-7, rtol=1e-4)


def test_feature_matching_by_hand_and_zero_at_the_teachers_samples() -> None:
    process, rollout = ONE_OF_EACH[0], rollout_at(ONE_OF_EACH[0], 1.0)
    denoiser = ScriptedDenoiser(process, {}, lambda z_t, t, conditioning: [z_t, 100 * z_t[:, :2]])
    settings = DistillerSettings(feature_timesteps=(100,))
    z = torch.randn(B, 4, 3, 3, generator=seeded(1), requires_grad=True)
    term = feature_matching_term(denoiser, settings, z, rollout, seeded(0))
    wanted, made = (call.z_t for call in denoiser.called("features"))
    alpha = process.alpha_sigma(torch.tensor(100.0))[0]
    torch.testing.assert_close(made - wanted, alpha * (z.detach() - rollout.z_teacher), atol=1e-5, rtol=1e-5)
    levels = [
        (part(made) - part(wanted)).square().mean() / part(wanted).var() for part in (lambda x: x, lambda x: x[:, :2])
    ]
    assert term.item() == pytest.approx(sum(level.item() for level in levels) / 2, rel=1e-5)  # scale counts nothing
    same = rollout.z_teacher.clone().requires_grad_()
    zero = feature_matching_term(denoiser, settings, same, rollout, seeded(0))
    assert zero.item() == 0
    assert not torch.autograd.grad(zero, same)[0].any()


# -- adversarial -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["all", "first_step"])
def test_gradient_norm_weighting_sets_the_ratio_of_the_gradients(rows: Any) -> None:
    first, modes = [True, False, True, False], (1.0, 1.0, 1.0, 1.0)
    acting = torch.tensor(first) if rows == "first_step" else torch.ones(4, dtype=torch.bool)
    options = {"adversarial_rows": rows}
    distillation, _ = output_gradient(make_distiller(**options), mixed_rollout(first), Phase(modes))
    alone, _ = output_gradient(
        make_distiller(**options), mixed_rollout(first), Phase(modes, distillation=0.0, adversarial=1.0)
    )
    both, terms = output_gradient(
        make_distiller(adversarial_weighting="gradient_norm", **options),
        mixed_rollout(first),
        Phase(modes, adversarial=0.3),
    )
    added = both - distillation
    assert added[acting].norm().item() == pytest.approx(0.3 * distillation[acting].norm().item(), rel=1e-3)
    torch.testing.assert_close(added, terms["adversarial_weight"] * alone, atol=1e-6, rtol=1e-3)
    expected = terms["distillation"] + terms["adversarial_weight"] * terms["adversarial"]
    assert terms["total"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_relativistic_losses_by_hand() -> None:
    real, fake = torch.tensor([1.0, 3.0]).reshape(1, 1, 1, 2), torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2
    assert losses.discriminator_loss("relativistic", [real], [fake]).item() == pytest.approx(expected, rel=1e-6)
    # The two sides are mirror images: the student wants its samples above the real ones by the same measure.
    assert losses.generator_loss("relativistic", [real], [fake]).item() == pytest.approx(expected, rel=1e-6)
    apart = losses.generator_loss("relativistic", [fake], [real])
    assert apart.item() == pytest.approx((math.log1p(math.exp(1)) + math.log1p(math.exp(-1))) / 2, rel=1e-6)
    assert losses.discriminator_loss("relativistic", [real], [real]).item() == pytest.approx(math.log(2), rel=1e-6)
    with pytest.raises(ValueError, match="pass real="):
        losses.generator_loss("relativistic", [fake])


def test_relativistic_pairs_share_condition_noise_and_level() -> None:
    distiller = make_distiller(adversarial="relativistic", adversarial_timesteps=(10, 20))
    denoiser, rollout = distiller.denoiser, mixed_rollout([True] * 4)
    asked: list[tuple[Tensor, Tensor]] = []
    features = denoiser.features

    def recording(z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        asked.append((z_t.detach(), t))
        return features(z_t, t, conditioning)

    denoiser.features = recording
    step = distiller.student_step(rollout, Phase((1, 1, 1, 1), adversarial=1.0), seeded(0))
    (fake, t), (real, t_real) = asked
    assert torch.equal(t, t_real)
    assert set(t.tolist()) <= {10, 20}
    alpha = broadcast(denoiser.process.alpha_sigma(t)[0], real)
    torch.testing.assert_close(real - fake, alpha * (rollout.z_teacher - step.z_student), atol=1e-5, rtol=1e-5)


def test_the_accuracy_is_the_share_of_pairs_that_the_heads_tell_apart() -> None:
    def logits(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 2)

    right_right_tie = pair_accuracy([logits(1, 5, 0)], [logits(0, 4, 0)])
    assert right_right_tie.item() == pytest.approx(2.5 / 3)
    two_heads = pair_accuracy([logits(1, 1), logits(1, 1)], [logits(0, 0), logits(0, 2)])
    assert two_heads.item() == pytest.approx(0.75)
