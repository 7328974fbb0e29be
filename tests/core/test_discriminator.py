"""The discriminator's heads: shapes, scales, gradients."""

from __future__ import annotations

import pytest
import torch

from flash_diffusion.flash_core.discriminator import Discriminator


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_one_logit_map_per_depth_at_half_the_size() -> None:
    features = [torch.randn(2, 32, 16, 16), torch.randn(2, 64, 8, 8), torch.randn(2, 128, 4, 4)]
    logits = Discriminator([32, 64, 128])(features)
    assert [tuple(map_.shape) for map_ in logits] == [(2, 1, 8, 8), (2, 1, 4, 4), (2, 1, 2, 2)]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 5), (2, 2)])
def test_any_map_size_works_down_to_one_pixel(size: tuple[int, int]) -> None:
    (logits,) = Discriminator([6])([torch.randn(1, 6, *size)])
    assert logits.shape == (1, 1, (size[0] + 1) // 2, (size[1] + 1) // 2)


@pytest.mark.parametrize("hidden", [4, 8, 12, 20, 64])
def test_any_width_works(hidden: int) -> None:
    (logits,) = Discriminator([6], hidden=hidden)([torch.randn(2, 6, 8, 8)])
    assert logits.shape == (2, 1, 4, 4)


def test_the_scale_of_hidden_states_does_not_matter() -> None:
    # Hidden states of different depths differ by orders of magnitude; a head must not care.
    discriminator, features = Discriminator([16]), torch.randn(2, 16, 8, 8)
    assert torch.allclose(discriminator([features])[0], discriminator([1000 * features])[0], atol=1e-3)


def test_samples_are_scored_one_by_one() -> None:
    discriminator, features = Discriminator([16]), torch.randn(4, 16, 8, 8)
    together = discriminator([features])[0]
    alone = torch.cat([discriminator([features[[row]]])[0] for row in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_half_precision_features_are_scored_in_full_precision() -> None:
    (logits,) = Discriminator([16])([torch.randn(2, 16, 8, 8).bfloat16()])
    assert logits.dtype == torch.float32


def test_gradients_reach_every_feature_and_every_parameter() -> None:
    discriminator = Discriminator([8, 16], hidden=8)
    features = [torch.randn(2, 8, 8, 8).requires_grad_(), torch.randn(2, 16, 4, 4).requires_grad_()]
    torch.stack([logits.square().mean() for logits in discriminator(features)]).sum().backward()
    assert all(feature.grad is not None and float(feature.grad.abs().sum()) > 0 for feature in features)
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_discriminator_learns_to_separate_two_textures() -> None:
    discriminator = Discriminator([4], hidden=16)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    smooth = torch.randn(16, 4, 1, 1).expand(16, 4, 8, 8)
    rough = torch.randn(16, 4, 8, 8)
    for _ in range(60):
        optimiser.zero_grad()
        (real,), (fake,) = discriminator([smooth]), discriminator([rough])
        ((real - 1).square().mean() + fake.square().mean()).backward()
        optimiser.step()
    assert discriminator([smooth])[0].mean().item() > 0.8
    assert discriminator([rough])[0].mean().item() < 0.2


def test_the_head_on_latents_tells_a_blur_that_the_features_hide() -> None:
    # The features of both are the same; and every sample has mean 0 and variance 1, so that a norm would hide it too.
    discriminator = Discriminator([4], hidden=16, latents=4)
    optimiser = torch.optim.Adam(discriminator.parameters(), lr=3e-3)

    def views(blurred: bool) -> list[torch.Tensor]:
        z = torch.randn(16, 4, 10, 10)
        z = torch.nn.functional.avg_pool2d(z, 3, stride=1) if blurred else z[..., 1:-1, 1:-1]
        return [torch.ones(16, 4, 8, 8), (z - z.mean((1, 2, 3), keepdim=True)) / z.std((1, 2, 3), keepdim=True)]

    for _ in range(60):
        optimiser.zero_grad()
        real, fake = discriminator(views(False)), discriminator(views(True))
        torch.stack(
            [(r - 1).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True)]
        ).sum().backward()
        optimiser.step()
    (blind, sharp), (blind_too, blurred) = discriminator(views(False)), discriminator(views(True))
    assert torch.allclose(blind, blind_too)
    assert sharp.mean().item() > 0.8
    assert blurred.mean().item() < 0.2


def test_wrong_views_are_named() -> None:
    with pytest.raises(ValueError, match="expected 2 maps, one for each head; got 1"):
        Discriminator([4, 8])([torch.randn(1, 4, 2, 2)])
    with pytest.raises(ValueError, match="expected 2 maps, one for each head; got 1"):
        Discriminator([4], latents=4)([torch.randn(1, 4, 2, 2)])
    with pytest.raises(ValueError, match="at least one feature map"):
        Discriminator([])
