"""Memory of the data layer against the number of samples, the time of a warm start, and what workers are worth.

    python -m benchmarks.data_layer memory [--samples 1000 100000 1000000] [--folder FOLDER]
    python -m benchmarks.data_layer index [--samples 1000 1000000] [--folder FOLDER]
    python -m benchmarks.data_layer workers [--pictures 96]

``memory`` prepares shards of tiny pictures with distinct captions and asks for 1,000 batches, each number of samples in
a process of its own, with an empty cache and again with a full one. The encoders are stand-ins of a few numbers, so
that the data layer is all that grows. Memory is the process's own (RssAnon): the pages of libraries come and go with
the system's file cache. Above 100,000 samples each picture comes several times, which saves time and changes no array
of the data layer. A million samples take about 3 GB on disk and 20 minutes on two cores.

``index`` lists a folder of so many pictures with captions; nothing is read.

``workers`` encodes JPEGs of 2000 x 1500 pixels. The stand-in encoder waits, as a CPU waits for an accelerator, as long
as one picture takes to decode. The ratio is the time without workers to the time with workers; 2 is the most.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from flash_diffusion.flash_core.denoiser import Conditioning
from flash_diffusion.trainer.config import DataSection
from flash_diffusion.trainer.data.batches.order import Order
from flash_diffusion.trainer.data.encoding.prepare import prepare_examples
from flash_diffusion.trainer.data.framing import to_tensor
from flash_diffusion.trainer.data.reading import decode, open_source
from flash_diffusion.trainer.data.reading.samples import RawSample
from flash_diffusion.trainer.tasks.base import NoOptions, TextToImage
from flash_diffusion.trainer.teachers.sizes import Sizes

MB = 1e6
SHARD = 10_000  # samples
DISTINCT = 100_000  # pictures
SIDE = 8  # pixels of the tiny pictures
BATCHES, BATCH = 1000, 16
FRAME = 512  # pixels of the photographs after scaling


class StandIn:
    """What the data layer asks of a teacher: encoders of a few numbers, without weights."""

    name = "stand-in"
    base = "stand-in"
    image_adapter = None
    low_resolution_process = None

    def __init__(self, side: int, device: str = "cpu", wait: float = 0.0) -> None:
        self.resolution = (side, side)
        self.scale_factor = side
        self.latent_shape = (3, 1, 1)
        self.sizes = Sizes(self.name, scale=side, grain=side, own=side, most=None, channels=3)
        self.device = torch.device(device)
        self.wait = wait  # seconds a picture

    def image_encoder_hash(self) -> str:
        """Return a constant: the stand-in has no weights."""
        return f"stand-in of {self.resolution[0]} px"

    def text_encoder_hash(self) -> str:
        """Return a constant."""
        return "stand-in"

    def encode(self, images: Tensor) -> Tensor:
        """Return the mean colour of each picture; on ``meta`` only wait, as for an accelerator."""
        if images.device.type == "meta":
            time.sleep(self.wait * len(images))
            return torch.zeros(len(images), *self.latent_shape)
        return adaptive_avg_pool2d(images, 1)

    def encode_prompts(self, prompts: Sequence[str], *, warn: bool = True) -> Conditioning:
        """Return a few numbers of each prompt."""
        return Conditioning(cross_attention=torch.tensor([[[float(len(text)), 1.0]] for text in prompts]))

    def cut_prompts(self, prompts: Sequence[str]) -> list[bool]:
        """Return False for each prompt."""
        return [False] * len(prompts)

    def warn_of_cut(self, prompts: Sequence[str], count: int | None = None) -> None:
        """Do nothing: no prompt is cut."""

    def unconditional(self, batch: int) -> Conditioning:
        """Return the conditions of the empty prompt."""
        return self.encode_prompts([""] * batch)

    def with_size(self, conditioning: Conditioning, size: tuple[int, int]) -> Conditioning:
        """Return the conditions: the stand-in reads no size."""
        return conditioning


# -- memory ------------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, samples: int) -> Path:
    """Write shards of tiny pictures with distinct captions, unless they are there."""
    folder = folder / f"shards-{samples}"
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, samples, SHARD):
        random = np.random.default_rng(first % DISTINCT)
        with tarfile.open(folder / f"{first:09d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + SHARD, samples)):
                pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8).tobytes()
                for ending, content in (
                    ("ppm", f"P6 {SIDE} {SIDE} 255 ".encode() + pixels),
                    ("txt", f"picture number {number} of a large data set".encode()),
                ):
                    info = tarfile.TarInfo(f"{number:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (folder / "complete").touch()
    return folder


def measure_memory(shards: Path, cache: Path) -> dict[str, float]:
    """Prepare the shards' samples and draw 1,000 batches in this process."""
    data = DataSection(source="webdataset", path=shards, cache=cache, encode_batch=64)
    begin = time.perf_counter()
    with Peak() as peak:
        examples = prepare_examples(data, StandIn(SIDE), TextToImage(NoOptions()))  # type: ignore[arg-type]
        seconds = time.perf_counter() - begin
        order = Order(len(examples), 0, examples.frames, BATCH)
        begin = time.perf_counter()
        for number in range(BATCHES):
            examples.batch(order.indices(number * BATCH, BATCH), "cpu")
        batch = (time.perf_counter() - begin) / BATCHES
    return {"samples": len(examples), "seconds": seconds, "peak": peak.most, "resident": resident(), "batch": batch}


class Peak:
    """The most memory of this process's own inside a ``with`` block, in MB, looked at 50 times a second."""

    def __enter__(self) -> Peak:
        """Begin to look."""
        self.most, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, resident())


def resident() -> float:
    """Return the resident memory of this process's own, in MB, without the pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError("this benchmark needs Linux: /proc/self/status has no RssAnon")


def print_memory(folder: Path, samples: Sequence[int]) -> None:
    """Print a row for each number of samples and each state of the cache."""
    say("| samples | cache | s to prepare | peak, MB | resident after 1,000 batches, MB | ms a batch of 16 |")
    say("|---|---|---|---|---|---|")
    for count in samples:
        shards = write_shards(folder, count)
        for state in ("empty", "full"):
            row = in_own_process("--measure", "memory", str(shards), str(folder / f"cache-{count}"))
            say(
                f"| {row['samples']:,.0f} | {state} | {row['seconds']:.1f} | {row['peak']:.0f} | "
                f"{row['resident']:.0f} | {1e3 * row['batch']:.1f} |"
            )


# -- the index of a folder ---------------------------------------------------------------------------------------------


def write_folder(folder: Path, samples: int) -> Path:
    """Write a folder of empty pictures and captions, unless it is there."""
    folder = folder / f"folder-{samples}"
    if not folder.exists():
        folder.mkdir(parents=True)
        for number in range(samples):
            for ending in ("jpg", "txt"):
                (folder / f"IMG_{number:09d}.{ending}").touch()
    return folder


def measure_index(folder: Path) -> dict[str, float]:
    """List a folder in this process."""
    before, begin = resident(), time.perf_counter()
    with Peak() as peak:
        source = open_source(DataSection(source="folder", path=folder))
    seconds = time.perf_counter() - begin
    return {"units": len(source), "seconds": seconds, "peak": peak.most - before, "resident": resident() - before}


def print_index(folder: Path, samples: Sequence[int]) -> None:
    """Print a row for each number of pictures."""
    say("| pictures | s | peak above the start, MB | resident above the start, MB |")
    say("|---|---|---|---|")
    for count in samples:
        row = in_own_process("--measure", "index", str(write_folder(folder, count)))
        say(f"| {count:,} | {row['seconds']:.1f} | {row['peak']:.0f} | {row['resident']:.0f} |")


# -- workers -----------------------------------------------------------------------------------------------------------


def write_photographs(folder: Path, count: int) -> Path:
    """Write JPEGs of 2000 x 1500 pixels with captions, unless they are there."""
    folder = folder / f"photographs-{count}"
    if not folder.exists():
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)
        for number in range(count):
            coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8))
            coarse.resize((2000, 1500), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=92)
            (folder / f"{number:04d}.txt").write_text("a photograph")
    return folder


def print_workers(folder: Path, pictures: int, rounds: int) -> None:
    """Print seconds without and with workers, and their ratio, round by round: the machine may be busy with others."""
    torch.set_num_threads(1)
    task, path = TextToImage(NoOptions()), write_photographs(folder, pictures)
    say(f"{pictures} pictures of 2000 x 1500 to {FRAME} x {FRAME}")
    say("| round | decoding or encoding a picture, ms | without workers, s | with 4 workers, s | ratio |")
    say("|---|---|---|---|---|")
    ratios = []
    for number in range(rounds):
        wait, seconds = decoding_time(path), []
        for workers in (0, 4):
            with tempfile.TemporaryDirectory() as cache:
                data = DataSection(source="folder", path=path, cache=Path(cache), workers=workers)
                # Files are listed and captions are encoded off the clock.
                prepare_examples(data, StandIn(FRAME, "meta"), task)  # type: ignore[arg-type]
                shutil.rmtree(Path(cache) / "latents")
                begin = time.perf_counter()
                prepare_examples(data, StandIn(FRAME, "meta", wait), task)  # type: ignore[arg-type]
                seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
        say(f"| {number + 1} | {wait * 1e3:.0f} | {seconds[0]:.1f} | {seconds[1]:.1f} | {ratios[-1]:.2f} |")
    say(f"| median | | | | {statistics.median(ratios):.2f} |")


def decoding_time(folder: Path) -> float:
    """Return the seconds that it takes to decode and scale one picture, on one core."""
    samples = list(open_source(DataSection(source="folder", path=folder)).read(0))[:12]
    begin = time.perf_counter()
    for sample in samples:
        assert isinstance(sample, RawSample)
        to_tensor(decode(sample).image, (FRAME, FRAME))
    return (time.perf_counter() - begin) / len(samples)


# -- the command -------------------------------------------------------------------------------------------------------


def in_own_process(*arguments: str) -> dict[str, float]:
    """Return what this script measures in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_layer", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return {name: float(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure and print."""
    if sys.argv[1] == "--measure":
        measure = {"memory": measure_memory, "index": measure_index}[sys.argv[2]]
        say(json.dumps(measure(*map(Path, sys.argv[3:]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "index", "workers"])
    parser.add_argument("--samples", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--pictures", type=int, default=96, help="of workers (default: 96)")
    parser.add_argument("--rounds", type=int, default=5, help="of workers (default: 5)")
    parser.add_argument("--folder", type=Path, help="keeps data and caches between calls (default: removed at the end)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.what == "memory":
            print_memory(folder, arguments.samples)
        elif arguments.what == "index":
            print_index(folder, arguments.samples)
        else:
            print_workers(folder, arguments.pictures, arguments.rounds)


if __name__ == "__main__":
    main()
