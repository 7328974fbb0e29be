"""Processes that share a batch draw the numbers of one process, and their means are those of the whole batch."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_diffusion.flash_core.terms.draws import choices, integers, normal, uniform
from flash_diffusion.flash_core.terms.shared_batch import SharedBatch, even_shares, shared


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def processes(ranks: int, each: int, seed: int = 0) -> list[SharedBatch]:
    """The batches of all processes, with streams of one seed."""
    return [SharedBatch(seeded(seed), ranks * each, tuple(range(rank, ranks * each, ranks))) for rank in range(ranks)]


def joined(parts: list[Tensor]) -> Tensor:
    """The rows of all processes in the order of the batch: process r of n has the rows r, r + n, ..."""
    return torch.stack(parts, dim=1).flatten(0, 1)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_all_processes_together_draw_what_one_process_draws(ranks: int, each: int, seed: int) -> None:
    one, total = seeded(seed), ranks * each
    wanted = [
        normal(torch.empty(total, 2, 3), one),
        uniform(total, one),
        integers(0, 999, total, one),
        choices((10, 250, 500), total, one),
    ]
    drawn = [
        [
            normal(torch.empty(each, 2, 3), of),
            uniform(each, of),
            integers(0, 999, each, of),
            choices((10, 250, 500), each, of),
        ]
        for of in processes(ranks, each, seed)
    ]
    for kind, expected in enumerate(wanted):
        assert torch.equal(joined([own[kind] for own in drawn]), expected)


@given(st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_the_mean_over_processes_is_the_mean_over_the_chosen_samples(
    ranks: int, each: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.booleans(), min_size=ranks * each, max_size=ranks * each))
    values, noise = torch.arange(1.0, ranks * each + 1), seeded(3)
    expected_noise = torch.randn(sum(chosen), 2, generator=noise)
    means, rows_of_all, noise_of_all = [], [], {}
    for rank, batch in enumerate(processes(ranks, each, 3)):
        rows, part = batch.part(chosen)
        assert bool(rows) == any(chosen)
        if not rows:
            continue
        drawn = normal(torch.empty(len(rows), 2), part)
        means.append(part.weighted(values[rank::ranks][rows].mean()))
        if part.weight:
            rows_of_all += [batch.own[row] for row in rows]
            noise_of_all |= dict(zip(part.own, drawn, strict=True))
    assert sorted(rows_of_all) == [position for position, taken in enumerate(chosen) if taken]
    if any(chosen):
        torch.testing.assert_close(torch.stack(means).mean(), values[torch.tensor(chosen)].mean())
        assert torch.equal(torch.stack([noise_of_all[place] for place in sorted(noise_of_all)]), expected_noise)


@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_even_shares_hold_every_sample_once_and_are_even(ranks: int, each: int, random: Random) -> None:
    costs = [random.randint(1, 32) for _ in range(ranks * each)]
    shares = even_shares(costs, ranks)
    assert sorted(position for share in shares for position in share) == list(range(len(costs)))
    assert {len(share) for share in shares} == {each}
    sums = [sum(costs[position] for position in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs) - min(costs)


def test_variance_and_norm_are_those_of_all_samples() -> None:
    values = torch.randn(6, 3, generator=seeded(1))
    first, second = values[0::2], values[1::2]
    # What the sums over two processes would be, worked from the other process's rows.
    mean = values.mean()
    sums = iter([values.sum(), (values - mean).square().sum(), values.square().sum()])
    batch = SharedBatch(seeded(0), 6, (0, 2, 4), add=lambda _: next(sums))
    torch.testing.assert_close(batch.variance(first), values.var())
    torch.testing.assert_close(batch.norm(first), values.norm())
    added: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        added.append(value)
        return value

    borrowed = SharedBatch(seeded(0), 3, (0,), weight=0.0, add=keep)
    borrowed.norm(second[:1])
    assert added == [torch.zeros(())]  # a sample in the place of others counts nothing


def test_a_generator_is_a_batch_of_its_own() -> None:
    batch = shared(seeded(0), 5)
    assert (batch.alone, batch.weight, batch.part([False] * 5)[0]) == (True, 1.0, [])
    with pytest.raises(ValueError, match="this batch has 5 samples; got 4 choices"):
        batch.part([True] * 4)
