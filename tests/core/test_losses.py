"""The losses by worked values, the gradient penalty and distribution matching by their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_diffusion.flash_core import losses
from flash_diffusion.flash_core.discriminator import Discriminator

ADVERSARIAL = ["lsgan", "hinge", "non_saturating", "wgan", "vanilla"]


def row(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# -- latents ---------------------------------------------------------------------------------------------------------


def test_latent_losses_by_hand() -> None:
    prediction, target = row(1.0, -2.0), row(0.0, 1.0)  # differences 1 and -3
    assert losses.latent_loss("mse", prediction, target).item() == pytest.approx((1 + 9) / 2)
    assert losses.latent_loss("l1", prediction, target).item() == pytest.approx((1 + 3) / 2)
    c = 1e-3
    expected = (math.sqrt(1 + c * c) - c + math.sqrt(9 + c * c) - c) / 2
    assert losses.latent_loss("pseudo_huber", prediction, target).item() == pytest.approx(expected)


def test_pseudo_huber_is_quadratic_below_c_and_linear_above() -> None:
    zero, c = row(0.0).double(), losses.PSEUDO_HUBER_C
    small, large = 1e-3 * c, 1e3 * c
    near = losses.latent_loss("pseudo_huber", row(small).double(), zero).item()
    far = losses.latent_loss("pseudo_huber", row(large).double(), zero).item()
    assert near == pytest.approx(small**2 / (2 * c), rel=1e-4)
    assert far == pytest.approx(large - c, rel=1e-3)
    assert losses.latent_loss("pseudo_huber", row(math.sqrt(3) * c).double(), zero).item() == pytest.approx(c, rel=1e-4)


# -- adversarial -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("lsgan", ((0 - 1) ** 2 + (2 - 1) ** 2) / 2),
        ("hinge", -1.0),
        ("wgan", -1.0),
        ("non_saturating", (softplus(0) + softplus(-2)) / 2),
        ("vanilla", -(softplus(0) + softplus(2)) / 2),
    ],
)
def test_generator_losses_by_hand(kind: losses.AdversarialLoss, value: float) -> None:
    assert losses.generator_loss(kind, [row(0.0, 2.0)]).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("lsgan", 0.5 * (((1 - 1) ** 2 + (3 - 1) ** 2) / 2 + (0 + 4) / 2)),
        ("hinge", (0 + 0) / 2 + (1 + 0) / 2),
        ("wgan", -1.0 - 2.0),
        ("non_saturating", (softplus(-1) + softplus(-3)) / 2 + (softplus(0) + softplus(-2)) / 2),
        ("vanilla", (softplus(-1) + softplus(-3)) / 2 + (softplus(0) + softplus(-2)) / 2),
    ],
)
def test_discriminator_losses_by_hand(kind: losses.AdversarialLoss, value: float) -> None:
    assert losses.discriminator_loss(kind, [row(1.0, 3.0)], [row(0.0, -2.0)]).item() == pytest.approx(value, rel=1e-6)


def test_the_logistic_losses_are_binary_cross_entropy() -> None:
    real, fake = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    expected = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    assert torch.allclose(losses.discriminator_loss("vanilla", [real], [fake]), expected)
    assert torch.allclose(losses.discriminator_loss("non_saturating", [real], [fake]), expected)
    assert torch.allclose(
        losses.generator_loss("non_saturating", [fake]), F.binary_cross_entropy_with_logits(fake, ones)
    )
    assert torch.allclose(losses.generator_loss("vanilla", [fake]), -F.binary_cross_entropy_with_logits(fake, zeros))


@pytest.mark.parametrize("kind", ADVERSARIAL)
@given(logit=st.floats(0.01, 0.9))
def test_the_two_sides_pull_against_each_other(kind: losses.AdversarialLoss, logit: float) -> None:
    # The student wants the logit of its samples up, the discriminator wants it down and that of real ones up.
    fake, real = row(logit).requires_grad_(), row(logit).requires_grad_()
    (up,) = torch.autograd.grad(losses.generator_loss(kind, [fake]), fake)
    down, real_up = torch.autograd.grad(losses.discriminator_loss(kind, [real], [fake]), [fake, real])
    assert up.item() < 0
    assert real_up.item() < 0
    assert down.item() > 0


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_every_depth_has_the_same_weight(kind: losses.AdversarialLoss) -> None:
    large, small = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 2, 2)
    both = losses.generator_loss(kind, [large, small])
    apart = (losses.generator_loss(kind, [large]) + losses.generator_loss(kind, [small])) / 2
    assert torch.allclose(both, apart)
    both = losses.discriminator_loss(kind, [large, small], [-large, -small])
    apart = (
        losses.discriminator_loss(kind, [large], [-large]) + losses.discriminator_loss(kind, [small], [-small])
    ) / 2
    assert torch.allclose(both, apart)


def test_unknown_losses_are_named() -> None:
    with pytest.raises(ValueError, match="unknown latent loss 'huber'.*mse, l1, pseudo_huber"):
        losses.latent_loss("huber", row(1.0), row(1.0))
    for call in (
        lambda: losses.generator_loss("ragan", [row(1.0)]),
        lambda: losses.discriminator_loss("ragan", [row(1.0)], [row(1.0)]),
    ):
        with pytest.raises(ValueError, match="unknown adversarial loss 'ragan'.*lsgan, hinge, non_saturating"):
            call()


# -- gradient penalty ------------------------------------------------------------------------------------------------


def test_r1_of_a_linear_discriminator_is_its_weights_norm() -> None:
    weight = torch.tensor([1.0, -2.0, 2.0]).reshape(1, 3, 1, 1)
    features = torch.randn(5, 3, 1, 1).requires_grad_()
    logits = (weight * features).sum(1, keepdim=True)
    assert losses.r1_penalty([logits], [features]).item() == pytest.approx(9.0, rel=1e-6)


def test_r1_is_the_mean_squared_gradient_of_each_samples_own_score() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator([3, 5], hidden=8)
    features = [torch.randn(4, 3, 6, 6).requires_grad_(), torch.randn(4, 5, 3, 3).requires_grad_()]
    got = losses.r1_penalty(discriminator(features), features)
    expected = 0.0
    for sample in range(4):
        for depth, feature in enumerate(features):
            alone = feature[[sample]].detach().requires_grad_()
            score = discriminator.heads[depth](alone).mean()
            expected += torch.autograd.grad(score, alone)[0].pow(2).sum().item() / 4
    assert got.item() == pytest.approx(expected, rel=1e-4)


def test_r1_trains_the_discriminator() -> None:
    # Its own gradient, a second derivative, against a difference quotient.
    torch.manual_seed(1)
    discriminator = Discriminator([3], hidden=8).double()
    features = torch.randn(4, 3, 6, 6).double()
    weight = discriminator.heads[0][1].weight

    def penalty() -> Tensor:
        leaf = features.clone().requires_grad_()
        return losses.r1_penalty([discriminator.heads[0](leaf)], [leaf])

    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction, step = torch.randn_like(weight), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(penalty().item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


# -- distribution matching -------------------------------------------------------------------------------------------


def test_distribution_matching_by_hand() -> None:
    z, real, fake = row(2.0, 4.0).requires_grad_(), row(1.0, 1.0), row(1.5, 3.0)
    weight = 1 / (2.0 + 1e-5)  # mean |z - real| = (1 + 3) / 2
    loss = losses.distribution_matching_loss(z, real, fake)
    assert loss.item() == pytest.approx(((weight * 0.5) ** 2 + (weight * 2.0) ** 2) / 2)
    loss.backward()
    assert z.grad is not None
    assert z.grad.flatten().tolist() == pytest.approx([2 * weight * 0.5 / 2, 2 * weight * 2.0 / 2], rel=1e-6)


def test_distribution_matching_moves_from_the_fake_score_to_the_real_one() -> None:
    z = torch.zeros(1, 4, 2, 2, requires_grad=True)
    real, fake = torch.full_like(z, 3.0), torch.full_like(z, -3.0)
    losses.distribution_matching_loss(z, real, fake).backward()
    assert z.grad is not None
    assert bool((z.grad < 0).all())  # downhill is up, toward real


def test_distribution_matching_normalises_each_sample_by_itself() -> None:
    generator = torch.Generator().manual_seed(2)
    z, real, fake = (torch.randn(3, 4, 5, 5, generator=generator) for _ in range(3))
    z = z.requires_grad_()
    (together,) = torch.autograd.grad(losses.distribution_matching_loss(z, real, fake), z)
    for sample in range(3):
        alone = z[[sample]].detach().requires_grad_()
        loss = losses.distribution_matching_loss(alone, real[[sample]], fake[[sample]])
        assert torch.allclose(together[[sample]], torch.autograd.grad(loss, alone)[0] / 3, atol=1e-7)


def test_equal_scores_give_a_zero_gradient() -> None:
    z = torch.randn(2, 4, 3, 3).requires_grad_()
    loss = losses.distribution_matching_loss(z, z.detach(), z.detach())
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


# -- perceptual crops ------------------------------------------------------------------------------------------------


def decode(latents: Tensor) -> Tensor:
    """A stand-in decoder: three colours at four times the size."""
    return F.interpolate(latents[:, :3], scale_factor=4)


def squared(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).pow(2).mean((1, 2, 3))


def test_crops_are_the_same_window_of_every_latent_and_one_per_sample(generator: torch.Generator) -> None:
    place = torch.arange(8 * 12.0).reshape(1, 1, 8, 12).expand(16, 1, 8, 12)  # every pixel carries its own place
    first, second = losses.random_crops(generator, 4, place, -place)
    assert first.shape == (16, 1, 4, 4)
    assert torch.equal(first, -second)
    assert len({crop[0, 0, 0].item() for crop in first}) > 4
    assert bool((first[:, :, :, 1:] - first[:, :, :, :-1] == 1).all())
    assert bool((first[:, :, 1:] - first[:, :, :-1] == 12).all())


def test_crops_larger_than_the_latent_are_the_latent(generator: torch.Generator) -> None:
    latents = torch.randn(2, 4, 3, 9)
    (crops,) = losses.random_crops(generator, 4, latents)
    assert crops.shape == (2, 4, 3, 4)
    (crops,) = losses.random_crops(generator, 32, latents)
    assert torch.equal(crops, latents)


@pytest.mark.parametrize("reduce", [False, True], ids=["per-sample", "scalar"])
def test_perceptual_loss_is_the_distance_of_decoded_images(reduce: bool, generator: torch.Generator) -> None:
    prediction, target = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
    distance = (lambda a, b: squared(a, b).mean()) if reduce else squared
    got = losses.perceptual_loss(distance, decode, prediction, target, 6, generator)
    assert torch.allclose(got, F.mse_loss(prediction[:, :3], target[:, :3]))


def test_perceptual_gradient_goes_to_the_prediction_alone(generator: torch.Generator) -> None:
    prediction, target = torch.randn(2, 4, 8, 8).requires_grad_(), torch.randn(2, 4, 8, 8).requires_grad_()
    losses.perceptual_loss(squared, decode, prediction, target, 4, generator).backward()
    assert target.grad is None
    assert prediction.grad is not None
    assert (prediction.grad[:, 0] != 0).sum((1, 2)).tolist() == [16, 16]  # one window of 4 x 4 per sample
