"""Conditions in batches, and classifier-free guidance in one call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_diffusion.flash_core.denoiser import Conditioning, guided_z0, predict_z0, unconditional_branch
from flash_diffusion.flash_core.process import Process

from .helpers.networks import AdapterDenoiser, process_name, processes, tokens


def full(batch: int, seed: int = 0) -> Conditioning:
    """A batch of every kind of condition at once."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return Conditioning(
        cross_attention=draw(7, 5),
        attention_mask=torch.ones(batch, 7),
        vector=draw(3),
        size_ids=draw(6),
        concat=draw(2, 4, 4),
        embedded_guidance=draw(),
        image_tokens=draw(3, 5),
        hint=draw(3, 8, 8),
        noise_level=torch.arange(batch),
        residuals=(draw(3, 4, 4), draw(6, 2, 2)),
    )


def parts(conditioning: Conditioning) -> list[torch.Tensor]:
    collected: list[torch.Tensor] = []
    conditioning.map(lambda tensor: (collected.append(tensor), tensor)[1])
    return collected


def same(first: Conditioning, second: Conditioning) -> bool:
    return all(torch.equal(one, other) for one, other in zip(parts(first), parts(second), strict=True))


# -- conditioning ----------------------------------------------------------------------------------------------------


def test_rows_reach_every_kind_of_condition() -> None:
    conditioning = full(4)
    rows = conditioning.rows(torch.tensor([3, 0, 0]))
    assert len(conditioning) == 4
    assert len(rows) == 3
    assert len(parts(rows)) == 11
    for picked, whole in zip(parts(rows), parts(conditioning), strict=True):
        assert torch.equal(picked, whole[[3, 0, 0]])


def test_text_and_task_are_joined() -> None:
    whole = full(2)
    text = Conditioning(cross_attention=whole.cross_attention, vector=whole.vector)
    task = Conditioning(concat=whole.concat, residuals=whole.residuals)
    joined = text.joined(task)
    assert [id(tensor) for tensor in parts(joined)] == [id(tensor) for tensor in (*parts(text), *parts(task))]
    assert same(text.joined(Conditioning()), text)
    with pytest.raises(ValueError, match="concat, residuals"):
        joined.joined(task)


def test_unconditional_branch_keeps_the_tasks_conditions() -> None:
    whole = full(2)
    empty = Conditioning(
        cross_attention=torch.zeros(2, 7, 5),
        attention_mask=torch.ones(2, 7),
        vector=torch.zeros(2, 3),
        size_ids=torch.ones(2, 6),
    )
    branch = unconditional_branch(whole, empty)
    for name in ("cross_attention", "attention_mask", "vector", "size_ids"):
        assert getattr(branch, name) is getattr(empty, name)
    for name in ("concat", "image_tokens", "hint", "noise_level", "residuals"):
        assert getattr(branch, name) is getattr(whole, name)


def test_unconditional_branch_drops_the_named_conditions() -> None:
    whole = full(2)
    empty = Conditioning(cross_attention=torch.zeros(2, 7, 5))
    branch = unconditional_branch(whole, empty, ("image_tokens", "residuals"))
    assert branch.image_tokens is not None
    assert not bool(branch.image_tokens.any())
    assert branch.image_tokens.shape == whole.image_tokens.shape
    assert [bool(tensor.any()) for tensor in branch.residuals] == [False, False]
    assert branch.concat is whole.concat
    assert branch.vector is whole.vector  # the empty prompt has no vector, so the vector stays
    # A part that the batch does not have can be dropped too.
    assert same(unconditional_branch(Conditioning(cross_attention=whole.cross_attention), empty, ("hint",)), empty)
    with pytest.raises(ValueError, match="no part called picture"):
        unconditional_branch(whole, empty, ("picture",))


@given(batches=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_joined_batches_split_into_the_originals(batches: list[int]) -> None:
    separate = [full(batch, seed) for seed, batch in enumerate(batches)]
    joined = Conditioning.cat(separate)
    assert len(joined) == sum(batches)
    first = 0
    for part in separate:
        assert same(joined.rows(torch.arange(first, first + len(part))), part)
        first += len(part)


def test_absent_conditions_stay_absent() -> None:
    joined = Conditioning.cat([tokens(2), tokens(3)])
    assert joined.vector is not None
    assert joined.vector.shape == (5, 1)
    assert joined.cross_attention is None
    assert joined.residuals == ()
    assert len(Conditioning()) == 0
    assert Conditioning.cat([Conditioning(), Conditioning()]) == Conditioning()


def test_moving_moves_everything() -> None:
    assert all(tensor.device.type == "meta" for tensor in parts(full(2).to("meta")))


def test_different_kinds_are_not_joined() -> None:
    with pytest.raises(ValueError, match="some carry 'cross_attention' and some do not"):
        Conditioning.cat([full(1), tokens(1)])
    with pytest.raises(ValueError, match="different numbers of residuals"):
        Conditioning.cat([tokens(1), Conditioning(vector=torch.zeros(1, 1), residuals=(torch.zeros(1, 1, 1, 1),))])


# -- guidance --------------------------------------------------------------------------------------------------------

BATCH = 4


def setting(process: Process) -> tuple[AdapterDenoiser, torch.Tensor, torch.Tensor, Conditioning, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(BATCH, 4, 3, 3, generator=generator)
    t = torch.tensor([990.0, 749.0, 499.0, 30.0])
    return AdapterDenoiser.seeded(process), z_t, t, tokens(BATCH, 1.0), tokens(BATCH, -1.0)


@pytest.mark.parametrize("process", processes(), ids=process_name)
def test_batched_guidance_is_two_calls_combined_sample_by_sample(process: Process) -> None:
    denoiser, z_t, t, conditioning, unconditional = setting(process)
    guidance = torch.tensor([1.0, 3.0, 7.5, 13.0])
    got = guided_z0(denoiser, z_t, t, conditioning, unconditional, guidance)
    # Guidance as every pipeline writes it, on outputs, one sample and one branch at a time.
    for row in range(BATCH):
        one = [row]
        positive = denoiser.predict(z_t[one], t[one], conditioning.rows(torch.tensor(one)))
        negative = denoiser.predict(z_t[one], t[one], unconditional.rows(torch.tensor(one)))
        output = negative + float(guidance[row]) * (positive - negative)
        expected = process.z0_from_output(z_t[one], output, t[one])
        assert torch.allclose(got[one], expected, rtol=1e-5, atol=2e-5 * max(1.0, expected.abs().max().item()))


def test_guidance_1_is_conditional_and_0_is_unconditional() -> None:
    denoiser, z_t, t, conditioning, unconditional = setting(processes()[1])
    for scale, alone in ((1.0, conditioning), (0.0, unconditional)):
        got = guided_z0(denoiser, z_t, t, conditioning, unconditional, torch.full((BATCH,), scale))
        assert torch.allclose(got, predict_z0(denoiser, z_t, t, alone), atol=1e-5)
