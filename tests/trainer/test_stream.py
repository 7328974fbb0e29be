"""Streams: the same samples for any processes, workers and resumes, encoded as the teacher encodes them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection
from flash_diffusion.trainer.data.encoding.examples import as_rows, caption_at
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.data.framing import to_mask, to_tensor
from flash_diffusion.trainer.data.reading import read_samples
from flash_diffusion.trainer.data.streaming.examples import StreamBatches, StreamExamples
from flash_diffusion.trainer.errors import UserError
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

from ..families.pipelines import save_pipeline
from .shards import Server, picture, serving, shard, tar

SIZES = (5, 3, 8, 1, 6, 4)  # of the shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards of different sizes."""
    folder = tmp_path_factory.mktemp("shards")
    for number, size in enumerate(SIZES):
        (folder / f"{number}.tar").write_bytes(shard(100 * number, size))
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    return load_teacher(ModelSection(family="sd15", path=str(tiny_model)), "cpu", 16)


def examples(path: Any, cache: Path, task: str = "text-to-image", teacher: Any = None, **fields: Any) -> StreamExamples:
    """Return the examples of a stream; without a teacher its samples can be read, but not encoded."""
    content: dict[str, Any] = {"source": "webdataset", "path": path, "stream": True, "lanes": 4, "shuffle": 12,
                               "workers": 0, "cache": cache, **fields}  # fmt: skip
    teacher = teacher or SimpleNamespace(resolution=(16, 16))
    return StreamExamples(DataSection(**content), teacher, build_task(TaskSection(name=task)), seed=5)


def numbers(stream: StreamExamples, ranks: int, size: int, first: int, batches: int) -> list[list[int]]:
    """Return the samples of each global batch, in the order of their positions; a sample's caption is its number."""
    readers = [StreamBatches(stream, rank, ranks, size) for rank in range(ranks)]
    found = []
    for number in range(batches):
        parts = [reader.batch(first + number * ranks * size) for reader in readers]
        samples = sorted((sample for part in parts for sample in part), key=lambda sample: sample.position)
        found.append([int(sample.captions[0]) for sample in samples])
    return found


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.integers(1, 4), size=st.integers(1, 3), start=st.integers(0, 70))
def test_any_number_of_processes_reads_the_same_global_batches(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int, size: int, start: int
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    wanted = [number for (number,) in numbers(examples(shards, cache), 1, 1, 0, start + 4 * ranks * size)]
    # With and without the counts that the run before has left.
    for folder in (cache, cache / "empty"):
        found = numbers(examples(shards, folder), ranks, size, start, 4)
        assert [number for batch in found for number in batch] == wanted[start:]


def test_epoch_of_the_lanes_has_every_sample_once(shards: Path, tmp_path: Path) -> None:
    stream = examples(shards, tmp_path, shuffle=4)
    every = {100 * number + index for number, size in enumerate(SIZES) for index in range(size)}
    lanes = numbers(stream, 1, stream.plan.lanes, 0, 2 * len(every))
    first = set()
    for lane in range(stream.plan.lanes):
        samples = sum(SIZES[number] for number in stream.plan.dealt(lane, 0))
        first |= {batch[lane] for batch in lanes[:samples]}
    assert first == every


def test_workers_read_what_one_process_reads(shards: Path, tmp_path: Path) -> None:
    wanted = numbers(examples(shards, tmp_path / "one"), 1, 3, 8, 6)
    assert numbers(examples(shards, tmp_path / "two", workers=2), 1, 3, 8, 6) == wanted


@pytest.mark.parametrize("ranges", [True, False], ids=["parts", "whole files"])
def test_web_server_gives_the_stream_of_the_local_files(shards: Path, tmp_path: Path, ranges: bool) -> None:
    files = {f"/{number}.tar": (shards / f"{number}.tar").read_bytes() for number in range(len(SIZES))}
    wanted = numbers(examples(shards, tmp_path / "local"), 1, 2, 0, 20)
    with serving(Server(files, ranges)) as server:
        found = numbers(examples(f"{server.url}/{{0..{len(SIZES) - 1}}}.tar", tmp_path / "remote"), 1, 2, 0, 20)
    assert found == wanted


def test_remote_shards_are_encoded_into_the_cache_once(shards: Path, tmp_path: Path, teacher: Teacher) -> None:
    files = {f"/{number}.tar": (shards / f"{number}.tar").read_bytes() for number in range(3)}
    task = build_task(TaskSection())
    index = torch.arange(sum(SIZES[:3]))
    local = DataSection(source="webdataset", path=str(shards / "{0..2}.tar"), cache=tmp_path / "local")
    wanted, _ = prepare_examples(local, teacher, task).batch(index, "cpu")
    with serving(Server(files)) as server:
        data = DataSection(source="webdataset", path=server.url + "/{0..2}.tar", cache=tmp_path / "remote")
        for gets in (True, False):  # the second time the server is asked for sizes and ETags only
            server.asked.clear()
            found, _ = prepare_examples(data, teacher, task).batch(index, "cpu")
            assert torch.equal(found, wanted)
            assert bool(server.asked) is gets


def test_latents_and_conditions_are_the_encoders_own(shards: Path, tmp_path: Path, teacher: Teacher) -> None:
    stream = examples(shards, tmp_path, teacher=teacher)
    samples = StreamBatches(stream, 0, 1, 4).batch(0)
    z0, conditioning = stream.encode(samples)
    local = {sample.caption: sample for sample in read_samples(DataSection(source="webdataset", path=shards))}
    chosen = [local[sample.captions[0]] for sample in samples]
    with torch.no_grad():
        images = torch.stack([to_tensor(sample.image, (16, 16)) for sample in chosen])
        assert torch.equal(z0, teacher.encode(images))
        assert torch.equal(
            conditioning.cross_attention, teacher.encode_prompts([sample.caption for sample in chosen]).cross_attention
        )


@pytest.mark.parametrize("family", ["sdxl", "pixart_alpha", "sd3"])
def test_streams_give_every_family_what_the_cache_gives(shards: Path, tmp_path: Path, family: str) -> None:
    """Sizes, masks and pooled vectors too, with and without a caption."""
    model = ModelSection(family=family, path=str(save_pipeline(family, tmp_path / family)))
    teacher = load_teacher(model, "cpu", 64)
    fields: dict[str, Any] = {"teacher": teacher, "caption_dropout": 0.4}
    stream = examples(shards, tmp_path, **fields)
    samples = StreamBatches(stream, 0, 1, 6).batch(0)
    found = stream.encode(samples)
    data = DataSection(source="webdataset", path=shards, cache=tmp_path / "cache")
    places = {sample.name: place for place, sample in enumerate(read_samples(data))}
    index = torch.tensor([places[sample.name] for sample in samples])
    chosen = torch.tensor([caption_at(5, position, 1, 0.4) for position in range(6)])
    assert len(set(chosen.tolist())) == 2
    wanted = prepare_examples(data, teacher, build_task(TaskSection())).batch(index, "cpu", chosen)
    torch.testing.assert_close(found[0], wanted[0])
    ours, theirs = as_rows(found[1]), as_rows(wanted[1])
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_dropped_captions_are_the_empty_prompt(shards: Path, tmp_path: Path, teacher: Teacher) -> None:
    stream = examples(shards, tmp_path, teacher=teacher, caption_dropout=0.5)
    _, conditioning = stream.encode(StreamBatches(stream, 0, 1, 24).batch(0))
    empty = teacher.unconditional(1).cross_attention[0]
    dropped = sum(torch.equal(row, empty) for row in conditioning.cross_attention)
    assert 4 < dropped < 20


def test_task_conditions_are_of_the_companion_or_drawn_anew(tmp_path: Path, teacher: Teacher) -> None:
    members = {}
    for number in range(3):
        members |= {f"{number}.png": picture(number), f"{number}.txt": b"x", f"{number}.mask.png": picture(number + 50)}
    (tmp_path / "with.tar").write_bytes(tar(members))
    stream = examples(tmp_path / "with.tar", tmp_path, "inpainting", teacher)
    samples = StreamBatches(stream, 0, 1, 3).batch(0)
    _, conditioning = stream.encode(samples)
    for row, sample in enumerate(samples):
        mask = next(
            to_mask(read.companions["mask"], (16, 16))
            for read in read_samples(stream.data.model_copy(update={"stream": False}), ("mask",))
            if read.name == sample.name
        )
        wanted = torch.nn.functional.interpolate((mask >= 0.5).float()[None], conditioning.concat.shape[-2:])[0]
        assert torch.equal(conditioning.concat[row, :1], wanted)
    (tmp_path / "without.tar").write_bytes(tar({name: part for name, part in members.items() if "mask" not in name}))
    drawn = []
    for _ in range(2):
        stream = examples(tmp_path / "without.tar", tmp_path, "inpainting", teacher)
        epochs = [StreamBatches(stream, 0, 1, 3).batch(position) for position in (0, 3)]
        drawn.append([stream.encode(sorted(samples, key=lambda one: one.name))[1].concat for samples in epochs])
    assert torch.equal(drawn[0][0], drawn[1][0])  # the same at the same positions
    assert not torch.equal(drawn[0][0], drawn[0][1])  # new ones in the next epoch


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A shard of eight samples: one has no picture that can be read, and one has no caption."""
    members = {}
    for number in range(8):
        members |= {f"{number}.png": picture(number), f"{number}.txt": str(number).encode()}
    members["3.png"] = b"no picture"
    del members["5.txt"]
    (tmp_path / "broken.tar").write_bytes(tar(members))
    return tmp_path / "broken.tar"


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_sample_fails_by_name(broken: Path, tmp_path: Path, workers: int) -> None:
    stream = examples(broken, tmp_path, workers=workers)
    reader = StreamBatches(stream, 0, 1, 1)
    words = r"^(3 in broken.tar is not a readable image|5 in broken.tar has no caption)"
    with pytest.raises(UserError, match=words):
        list(map(reader.batch, range(8)))


def test_broken_samples_are_left_out_and_named(broken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = examples(broken, tmp_path, on_error="skip", skip_limit=0.9, shuffle=4)
    epochs = numbers(stream, 1, 7, 0, 3)
    for epoch in epochs:  # seven places: six good samples, one of which takes the broken one's place
        assert set(epoch) == {0, 1, 2, 4, 6, 7}
    assert "3 in broken.tar is not a readable image" in caplog.text
    assert "5 in broken.tar has no caption" in caplog.text
    assert numbers(stream, 1, 1, 9, 5) == [[number] for epoch in epochs for number in epoch][9:14]
    assert [caption for caption, _ in stream.first_samples(9)] == ["0", "1", "2", "4", "6", "7"]


def test_too_many_broken_samples_end_the_run(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_diffusion.trainer.data.streaming.examples.CHECKED", 7)
    stream = examples(broken, tmp_path, on_error="skip", skip_limit=0.1)
    with pytest.raises(UserError, match="more than data.skip_limit allows"):
        numbers(stream, 1, 1, 0, 30)
    (tmp_path / "none.tar").write_bytes(tar({"0.png": b"none", "0.txt": b"x"}))
    with pytest.raises(UserError, match="8 samples in a row of .*none.tar can't be used"):
        numbers(examples(tmp_path / "none.tar", tmp_path, on_error="skip"), 1, 1, 0, 1)


def test_uneven_readers_are_named(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    StreamBatches(examples(shards, tmp_path), 0, 2, 1)
    assert "several readers" not in caplog.text
    StreamBatches(examples(shards, tmp_path, workers=3), 0, 1, 1)
    assert "4 lanes can't be shared evenly by 3 readers" in caplog.text
