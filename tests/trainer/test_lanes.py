"""The order of a stream: every sample once an epoch of its lane, the same for any readers and after any resume."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from flash_diffusion.trainer.data.streaming.lanes import Lane, LanePlan

Sizes = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)


class Shards:
    """Shards of numbered samples, which remember what was read.

    Attributes:
        counts: of the shards that were read to their end.
        begun: the shards that were opened.
    """

    def __init__(self, sizes: list[int], counts: dict[int, int] | None = None) -> None:
        self.sizes = sizes
        self.counts = {} if counts is None else dict(counts)
        self.begun: list[int] = []

    def read(self, shard: int) -> Iterator[tuple[int, int]]:
        self.begun.append(shard)
        for number in range(self.sizes[shard]):
            yield shard, number
        self.counts[shard] = self.sizes[shard]


def lane_of(plan: LanePlan, lane: int, shards: Shards, ahead: int = 0) -> Lane[tuple[int, int]]:
    return Lane(plan, lane, shards.read, shards.counts, ahead)


def reads_something(plan: LanePlan, lane: int, sizes: list[int]) -> bool:
    """Return True if the lane has samples within some epochs."""
    return any(sizes[shard] for epoch in range(20) for shard in plan.dealt(lane, epoch))


@given(sizes=Sizes, lanes=st.integers(1, 6), shuffle=st.integers(1, 30), seed=st.integers(0, 9))
def test_epoch_of_all_lanes_holds_every_sample_once(sizes: list[int], lanes: int, shuffle: int, seed: int) -> None:
    plan = LanePlan.of(len(sizes), lanes, shuffle, seed)
    for epoch in range(3):
        seen = []
        for lane in range(plan.lanes):
            before, now = (
                sum(sizes[shard] for e in range(end) for shard in plan.dealt(lane, e)) for end in (epoch, epoch + 1)
            )
            if now > before:
                seen += list(islice(lane_of(plan, lane, Shards(sizes)).samples(before), now - before))
        assert sorted(seen) == [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]


@given(
    sizes=Sizes,
    lanes=st.integers(1, 6),
    shuffle=st.integers(1, 30),
    readers=st.integers(1, 6),
    start=st.integers(0, 60),
    ahead=st.integers(0, 3),
    data=st.data(),
)
def test_any_readers_after_any_kill_read_the_same_order(
    sizes: list[int], lanes: int, shuffle: int, readers: int, start: int, ahead: int, data: st.DataObject
) -> None:
    """One reader without a stop is the standard. Which counts a killed run has left does not matter."""
    plan = LanePlan.of(len(sizes), lanes, shuffle, 0)
    if not all(reads_something(plan, lane, sizes) for lane in range(plan.lanes)):
        return
    end = start + 30
    whole = [lane_of(plan, lane, Shards(sizes)) for lane in range(plan.lanes)]
    wanted = [whole[position % plan.lanes].at(position // plan.lanes)[0] for position in range(end)]
    known = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    for reader in range(readers):
        shards = Shards(sizes, {shard: sizes[shard] for shard in known})
        lanes_read = [lane_of(plan, lane, shards, ahead) for lane in range(plan.lanes)]
        for position in range(start + reader, end, readers):
            found = lanes_read[position % plan.lanes].at(position // plan.lanes)
            assert found[0] == wanted[position]
            later = wanted[position :: plan.lanes][: ahead + 1]
            assert list(found[: len(later)]) == later


def test_lane_opens_only_its_shards_and_skips_known_ones() -> None:
    plan = LanePlan.of(40, 4, 8, seed=3)
    shards = Shards([10] * 40)
    list(islice(lane_of(plan, 1, shards).samples(0), 100))
    assert set(shards.begun) == set(plan.dealt(1, 0))
    # In the second epoch, 55 samples on: the first shards of the lane are behind.
    again = Shards([10] * 40, {shard: 10 for shard in range(40)})
    next(lane_of(plan, 1, again).samples(155))
    assert len(again.begun) <= 3
    assert set(again.begun) <= set(plan.dealt(1, 1)[3:7])


def test_lanes_mix_the_shards_anew_each_epoch_and_shuffle() -> None:
    plan = LanePlan.of(64, 8, 80, seed=0)
    assert plan.buffer == 10
    epochs = [plan.dealt(0, epoch) for epoch in range(4)]
    assert len(set(epochs)) == 4
    assert LanePlan.of(64, 8, 80, seed=1).dealt(0, 0) != epochs[0]
    order = list(islice(lane_of(plan, 0, Shards([100] * 64)).samples(0), 100))
    assert order != sorted(order)
    assert LanePlan.of(64, 8, 1, seed=0).buffer == 1
    plain = LanePlan.of(64, 8, 8, seed=0)
    order = list(islice(lane_of(plain, 0, Shards([100] * 64)).samples(0), 200))
    assert order == [(shard, number) for shard in plain.dealt(0, 0)[:2] for number in range(100)]
    assert LanePlan.of(3, 16, 1000, seed=0).lanes == 3
