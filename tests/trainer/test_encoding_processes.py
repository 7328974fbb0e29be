"""Several processes, and killed ones, fill the cache with the same bits as one process that nothing disturbs."""

from __future__ import annotations

import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from flash_diffusion.trainer import files
from flash_diffusion.trainer.config import DataSection, ModelSection, TaskSection
from flash_diffusion.trainer.data.encoding import passes
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.tasks import build_task
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

# A forked process has the teacher at once, where a new one imports and loads for seconds.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks processes and kills them")

PICTURES = 14
SECTIONS = (TaskSection(), TaskSection(name="inpainting", variants=2))


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Teacher:
    return load_teacher(ModelSection(family="sd15", path=str(tiny_model)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three shapes with captions of their own; two are copies."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(PICTURES - 2):
        shape = ((64, 64), (64, 96), (96, 64))[number % 3]
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    for number in (1, 5):
        for ending in ("png", "txt"):
            shutil.copy(folder / f"{number:02d}.{ending}", folder / f"{number:02d} copy.{ending}")
    return folder


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "CHUNK_ROWS", (2, 3))


def prepare(teacher: Teacher, folder: Path, cache: Path) -> None:
    """Encode for both tasks, as one process of those that the environment tells."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    data = DataSection(source="folder", path=folder, cache=cache, encode_batch=2, buckets=True)
    for section in SECTIONS:
        prepare_examples(data, teacher, build_task(section), section.variants, accelerator=accelerator)


def start(count: int, work: Callable[[int], Any]) -> list[int]:
    """Run ``work(rank)`` in forked processes that know each other; return their exit codes, killed when one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def begin(rank: int) -> None:
        torch.set_num_threads(1)
        if count > 1:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="localhost")
        work(rank)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=begin, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    waiting = list(processes)
    while waiting:
        multiprocessing.connection.wait([process.sentinel for process in waiting])
        waiting = [process for process in waiting if process.is_alive()]
        if any(process.exitcode for process in processes if process not in waiting):
            for process in waiting:
                process.kill()  # as a launcher does
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def content(cache: Path) -> dict[str, bytes]:
    """Path -> bytes of all files of a cache, without those that a killed process left unfinished."""
    found = [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".partial")]
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def undisturbed(teacher: Teacher, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache of one process."""
    cache = tmp_path_factory.mktemp("one") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "CHUNK_ROWS", (2, 3))
        assert start(1, lambda _: prepare(teacher, folder, cache)) == [0]
    found = content(cache)
    assert len(found) > 20
    return found


def test_two_processes_write_the_bits_of_one(
    teacher: Teacher, folder: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        encoded, original = [0], teacher.encode

        def encode(images: torch.Tensor) -> torch.Tensor:
            encoded[0] += len(images)
            return original(images)

        teacher.encode = encode  # type: ignore[method-assign]  # in the forked process only
        prepare(teacher, folder, tmp_path / "cache")
        (tmp_path / str(rank)).write_text(str(encoded[0]))

    assert start(2, work) == [0, 0]
    shares = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert sum(shares) == (PICTURES - 2) * (1 + 2)  # latents, and two variants of masked pictures
    assert min(shares) >= 10
    assert content(tmp_path / "cache") == undisturbed


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_encoding_goes_on_to_the_same_bits(
    teacher: Teacher, folder: Path, undisturbed: dict[str, bytes], tmp_path: Path, count: int
) -> None:
    """Each attempt kills itself at a random moment: when it encodes, or before, inside and after writing a file."""
    moments = random.Random(count)
    codes: list[int] = []
    while not codes or codes[-1]:
        left, victim = moments.randint(1, 25), moments.randrange(count)

        def work(rank: int, left: int = left, victim: int = victim) -> None:
            steps = iter(range(left))

            def step() -> None:
                if rank == victim and next(steps, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    step()
                    result = function(*arguments, **options)
                    step()
                    return result

                return call

            teacher.encode = stepping(teacher.encode)  # type: ignore[method-assign]
            files._settle = stepping(files._settle)
            files.os.replace = stepping(files.os.replace)  # type: ignore[attr-defined]
            prepare(teacher, folder, tmp_path / "cache")

        codes += [max(map(abs, start(count, work)))]
        assert codes[-1] in (0, signal.SIGKILL)
        assert len(codes) < 100
    assert len(codes) > 5
    assert content(tmp_path / "cache") == undisturbed
