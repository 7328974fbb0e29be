"""Read, decode and frame the samples of some positions, in this process or in worker processes.

Workers are started by spawn. They send pictures as Pillow's, through pipes: shared memory is small in many containers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...errors import UserError
from ..cache.manifest import content_key
from ..framing import framed
from ..reading import decode
from ..reading.samples import BadSample, RawSample, Source
from .counts import SampleCounts
from .lanes import Lane, LanePlan

Item = TypeVar("Item")

TRIES = 8  # samples in a row that may be undecodable, with data.on_error: skip


@dataclass(frozen=True)
class FramedSample:
    """A decoded sample.

    Attributes:
        position: in the stream.
        name: file or record, for messages.
        content: hash of the picture file's bytes.
        captions: one or more texts.
        image: RGB, scaled and cut to the frame.
        beside: companion -> RGB, scaled and cut alike.
        problems: name -> message of the samples that were left out on the way to this one.
    """

    position: int
    name: str
    content: bytes
    captions: tuple[str, ...]
    image: Image.Image
    beside: Mapping[str, Image.Image] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """What a worker could not read; the training process raises it.

    Attributes:
        message: for the user.
    """

    message: str


class Reader:
    """Reads the samples of rising positions.

    Args:
        plan: of the source's shards.
        frame: (height, width) in pixels.
        skip: leave samples out that can't be used; False: raise them.
        counts: are filled while shards are read.
    """

    def __init__(
        self, source: Source, plan: LanePlan, frame: tuple[int, int], skip: bool, counts: SampleCounts
    ) -> None:
        self.source = source
        self.plan = plan
        self.frame = frame
        self.skip = skip
        self.counts = counts
        self._lanes: dict[int, Lane[RawSample]] = {}
        self._bad: dict[str, str] = {}

    def sample(self, position: int) -> FramedSample:
        """Return the sample at a position. One that can't be decoded gives its place to the next of its lane.

        Raises:
            BadSample: a sample can't be used, and ``skip`` is False.
            UserError: too many samples in a row can't be used, or a shard can't be read.
        """
        number, lane = divmod(position, self.plan.lanes)
        if lane not in self._lanes:
            ahead = TRIES - 1 if self.skip else 0
            self._lanes[lane] = Lane(self.plan, lane, self._usable, self.counts, ahead)
        for raw in self._lanes[lane].at(number):
            try:
                found = self.framed(raw, position)
            except BadSample as problem:
                if not self.skip:
                    raise
                self._bad[problem.name] = str(problem)
                continue
            self._bad = {}
            return found
        raise UserError(
            f"{TRIES} samples in a row of {self.source.title} can't be used, the last one because: "
            f"{list(self._bad.values())[-1]}. `flash-diffusion data check` lists everything"
        )

    def framed(self, raw: RawSample, position: int) -> FramedSample:
        """Return a sample decoded, scaled and cut.

        Raises:
            BadSample: a picture is unreadable.
        """
        sample = decode(raw)
        beside = {
            name: framed(picture.convert("L").convert("RGB") if name == "mask" else picture, self.frame)
            for name, picture in sample.companions.items()
        }
        return FramedSample(
            position,
            raw.name,
            content_key(raw.picture),
            raw.captions,
            framed(sample.image, self.frame),
            beside,
            self._bad,
        )

    def _usable(self, shard: int) -> Iterator[RawSample]:
        """Yield the samples of a shard that have a caption and the right companions, and count them."""
        count = 0
        for sample in self.source.read(shard):
            if isinstance(sample, BadSample):
                if not self.skip:
                    raise sample
                self._bad[sample.name] = str(sample)
                continue
            count += 1
            yield sample
        self.counts.put(shard, count)


class Positions(IterableDataset[FramedSample | Failure]):
    """The samples at positions ``first``, ``first + stride``, ...; each worker takes its share of them."""

    def __init__(self, reader: Reader, first: int, stride: int) -> None:
        self.reader = reader
        self.first = first
        self.stride = stride

    def __iter__(self) -> Iterator[FramedSample | Failure]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        position = self.first + worker * self.stride
        while True:
            try:
                found: FramedSample | Failure = self.reader.sample(position)
            except UserError as error:
                found = Failure(str(error))
            yield found
            if isinstance(found, Failure):
                return
            position += workers * self.stride


def open_positions(positions: Positions, workers: int, ahead: int) -> Iterator[FramedSample | Failure]:
    """Return the samples, in order.

    Args:
        workers: processes that read; 0 reads in this process.
        ahead: samples that are read before they are asked for.
    """
    loader = DataLoader(
        positions,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=max(2, -(-ahead // workers)) if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
        generator=torch.Generator(),  # the loader draws a seed: not from training's random numbers
    )
    return iter(loader)


def _unchanged(item: Item) -> Item:
    return item


def _start_worker(parent: int, _worker: int) -> None:
    """Leave Ctrl-C and the first SIGTERM to the training process: it finishes its update, then ends the workers."""
    torch.set_num_threads(1)

    def first_sigterm(number: int, _frame: FrameType | None) -> None:
        if os.getppid() != parent:
            os._exit(128 + number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name != "nt":
        signal.signal(signal.SIGTERM, first_sigterm)
