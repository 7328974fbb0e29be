"""The order of the samples: every sample once an epoch, batches of one frame, the same after any resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_diffusion.trainer.data.batches.order import Order
from flash_diffusion.trainer.data.encoding.buckets import bucket_sizes, nearest_bucket
from flash_diffusion.trainer.data.encoding.examples import NO_CAPTION

# The aspect-ratio buckets of SDXL's report (arXiv 2307.01952, appendix I), height x width.
SDXL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 1152x896
1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512
1984x512 2048x512"""


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), seed=st.integers(0, 99), batch=st.integers(1, 8), processes=st.integers(1, 4))
def test_every_sample_comes_once_an_epoch_on_any_number_of_processes(
    length: int, seed: int, batch: int, processes: int
) -> None:
    order = Order(length, seed)
    drawn: list[int] = []
    while len(drawn) < 3 * length:
        parts = [order.indices(len(drawn) + process * batch, batch) for process in range(processes)]
        drawn += torch.cat(parts).tolist()
    for epoch in range(3):
        assert sorted(drawn[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert drawn == torch.cat([Order(length, seed).indices(at, 1) for at in range(len(drawn))]).tolist()


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    seed=st.integers(0, 99),
    batch=st.integers(1, 6),
    start=st.integers(0, 200),
)
def test_batches_have_one_frame_and_every_sample_of_a_frame_comes_before_any_again(
    frames: list[int], seed: int, batch: int, start: int
) -> None:
    frame = torch.tensor(frames)
    order = Order(len(frames), seed, frame, batch)
    members = Counter(frames)
    drawn: dict[int, list[int]] = {number: [] for number in members}
    for number in range(5 * len(frames) // batch + 1):
        index = order.indices(number * batch, batch)
        assert len(set(frame[index].tolist())) == 1
        drawn[int(frame[index[0]])] += index.tolist()
    for number, count in members.items():
        for first in range(0, len(drawn[number]) - count + 1, count):
            assert len(set(drawn[number][first : first + count])) == count
    # A run that resumes anywhere draws what it would have drawn.
    assert torch.equal(
        order.indices(start * batch, batch), Order(len(frames), seed, frame, batch).indices(start * batch, batch)
    )


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    batch=st.integers(1, 5),
    runs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=6),
)
def test_kills_and_other_numbers_of_processes_change_no_batch(
    frames: list[int], seed: int, batch: int, runs: list[tuple[int, int, int]]
) -> None:
    """Each run goes on from the last checkpoint of a killed one: some updates are lost, and drawn again."""
    frame, counts = torch.tensor(frames), torch.arange(len(frames)) % 3 + 1
    drawn: dict[int, tuple[list[int], list[int]]] = {}
    position = 0
    for processes, updates, lost in runs:
        order = Order(len(frames), seed, frame, batch)
        for update in range(updates):
            for rank in range(processes):
                at = position + (update * processes + rank) * batch
                index = order.indices(at, batch)
                found = index.tolist(), order.captions(at, counts[index], 0.2).tolist()
                assert drawn.setdefault(at, found) == found
        position += max(updates - lost, 0) * processes * batch
    assert sorted(drawn) == list(range(0, len(drawn) * batch, batch))  # without a gap
    seen = Counter(sample for samples, _ in drawn.values() for sample in samples)
    for number in set(frames):
        times = [seen[sample] for sample in range(len(frames)) if frames[sample] == number]
        assert max(times) - min(times) <= 1
    for samples, captions in drawn.values():
        assert all(NO_CAPTION <= caption < counts[sample] for sample, caption in zip(samples, captions, strict=True))


def test_large_frames_get_their_share_of_the_batches() -> None:
    frame = torch.tensor([0] * 90 + [1] * 30 + [2] * 3)
    order = Order(len(frame), 0, frame, 4)
    batches = Counter(int(frame[order.indices(4 * number, 4)[0]]) for number in range(123))  # 4 epochs
    assert batches == {0: 90, 1: 30, 2: 3}


def test_captions_are_drawn_evenly_and_dropped_at_their_rate() -> None:
    order = Order(10, 0)
    counts = torch.full((4000,), 3)
    drawn = order.captions(0, counts, 0.25)
    shares = Counter(drawn.tolist())
    assert shares[NO_CAPTION] == pytest.approx(1000, abs=100)
    assert all(shares[number] == pytest.approx(1000, abs=100) for number in range(3))
    assert torch.equal(drawn[100:], order.captions(100, counts[100:], 0.25))
    assert not order.captions(0, torch.ones(4000, dtype=torch.long), 0.0).any()


def test_buckets_at_1024_px_are_those_of_sdxl() -> None:
    published = {tuple(map(int, size.split("x"))) for size in SDXL.split()}
    assert published <= set(bucket_sizes(1024, 8))
    assert set(bucket_sizes(1024, 8)) - published <= {(1344, 704)}  # the report lists 704 x 1344 without its twin


@pytest.mark.parametrize(("resolution", "grain"), [(512, 8), (1024, 16), (64, 8), (768, 64), (256, 32)])
def test_buckets_keep_the_area_and_fit_the_model(resolution: int, grain: int) -> None:
    sizes = bucket_sizes(resolution, grain)
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % grain == width % grain == 0
        assert 0.9 * resolution**2 <= height * width <= resolution**2
        assert (width, height) in sizes


def test_a_picture_gets_the_frame_of_its_shape() -> None:
    frames = bucket_sizes(1024, 8)
    pictures = np.array([(3000, 2000), (2000, 3000), (500, 500), (9000, 100), (10, 900)])
    found = [frames[number] for number in nearest_bucket(pictures, frames)]
    assert found == [(832, 1216), (1216, 832), (1024, 1024), (512, 2048), (2048, 512)]
