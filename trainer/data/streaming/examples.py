"""Encode the samples of a stream batch by batch, and give its first samples for previews."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ...config import DataSection
from ...errors import UserError
from ...pictures import picture_signed
from ...seeds import stream
from ..cache.stores import manifests_folder
from ..encoding.examples import caption_at, text_of, unpacked
from ..encoding.pictures import drawn_conditions
from ..reading import open_source
from ..reading.samples import BadSample, Problems, Source
from ..reading.shards import Shards
from ..remote.patterns import file_name, shown
from .counts import SampleCounts
from .lanes import LanePlan
from .reader import Failure, FramedSample, Positions, Reader, open_positions

if TYPE_CHECKING:
    from ...tasks.base import Task
    from ...teachers.base import Teacher

logger = logging.getLogger(__name__)

HEAD = 24  # first samples, for previews
CHECKED = 1000  # samples between two checks of data.skip_limit
FOLDER = "streams"  # beside the lists of samples of cached data


class StreamExamples:
    """The samples of a run that are encoded as they come.

    Args:
        seed: of the order, the captions and the task's conditions.

    Attributes:
        fingerprint: a hash of the names of the shards.
    """

    def __init__(self, data: DataSection, teacher: Teacher, task: Task, seed: int) -> None:
        self.data = data
        self.teacher = teacher
        self.task = task
        self.seed = seed
        self.source = open_source(data, task.companions)
        self.plan = LanePlan.of(len(self.source), data.lanes, data.shuffle, seed)
        self.fingerprint = fingerprint(self.source, data, task.companions)
        self._head: list[FramedSample] = []

    # -- the stream ----------------------------------------------------------------------------------------------------

    def reader(self) -> Reader:
        """Return a new reader of the source."""
        name = fingerprint(self.source, self.data, self.task.companions, with_places=True)
        counts = SampleCounts(manifests_folder(self.data) / FOLDER / name, self.source)
        return Reader(self.source, self.plan, self.teacher.resolution, self.data.on_error == "skip", counts)

    @torch.no_grad()
    def encode(self, samples: Sequence[FramedSample]) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and conditions of samples, on the teacher's device."""
        images = torch.stack([picture_signed(sample.image) for sample in samples])
        z0 = self.teacher.encode(images.to(self.teacher.device))
        return z0, self._text(samples).joined(self._conditions(samples, images))

    def _text(self, samples: Sequence[FramedSample]) -> Conditioning:
        dropout = self.data.caption_dropout
        chosen = [caption_at(self.seed, sample.position, len(sample.captions), dropout) for sample in samples]
        texts = [self._caption(sample, max(number, 0)) for sample, number in zip(samples, chosen, strict=True)]
        encoded = replace(self.teacher.encode_prompts(texts), size_ids=None).to(self.teacher.device)
        return text_of(encoded, torch.tensor(chosen), self.teacher, self.teacher.resolution)

    def _caption(self, sample: FramedSample, number: int = 0) -> str:
        return sample.captions[number] if self.task.reads_text else ""

    def _conditions(self, samples: Sequence[FramedSample], images: Tensor) -> Conditioning:
        """Return the task's conditions, drawn from picture and position: new ones each time a picture comes."""
        if not self.task.has_conditions:
            return Conditioning()
        names = samples[0].beside
        beside = {name: torch.stack([_companion(name, sample) for sample in samples]) for name in names}
        streams = [stream(self.seed, "condition", sample.content.hex(), sample.position) for sample in samples]
        return unpacked(drawn_conditions(self.task, self.teacher, images, beside, streams))

    # -- the first samples, for previews -------------------------------------------------------------------------------

    def batch(
        self, index: Tensor, device: torch.device | str, caption: Tensor | None = None
    ) -> tuple[Tensor, Conditioning]:
        """Return latents and conditions of some of the first samples, with their first captions."""
        z0, conditioning = self.encode(
            [replace(self.head[row], captions=self.head[row].captions[:1]) for row in index.tolist()]
        )
        return z0.to(device), conditioning.to(device)

    def task_conditions(self, index: Tensor, device: torch.device | str) -> Conditioning:
        """Return the task's conditions of some of the first samples."""
        samples = [self.head[row] for row in index.tolist()]
        images = torch.stack([picture_signed(sample.image) for sample in samples])
        return self._conditions(samples, images).to(device)

    def first_samples(self, count: int) -> list[tuple[str, int]]:
        """Return captions and indices of the first samples with distinct captions, at most ``count``.

        Where a task has conditions of its own, samples with repeated captions follow, until there are ``count``.
        """
        first: dict[str, int] = {}
        for row, sample in enumerate(self.head):
            first.setdefault(self._caption(sample), row)
        rows = list(first.values())
        if self.task.has_conditions:
            rows += [row for row in range(len(self.head)) if row not in set(rows)]
        return [(self._caption(self.head[row]), row) for row in rows[:count]]

    @property
    def head(self) -> list[FramedSample]:
        """The first samples of the source that can be used.

        Raises:
            UserError: there is none.
        """
        if not self._head:
            for sample in self._from_the_begin():
                self._head.append(sample)
                if len(self._head) == HEAD:
                    break
            if not self._head:
                raise UserError(f"data.path: {self.source.title} holds no samples that can be used")
        return self._head

    def _from_the_begin(self) -> Iterator[FramedSample]:
        reader, skip, position = self.reader(), self.data.on_error == "skip", 0
        for shard in range(len(self.source)):
            for raw in self.source.read(shard):
                try:
                    if isinstance(raw, BadSample):
                        raise raw
                    yield reader.framed(raw, position)
                    position += 1
                except BadSample:
                    if not skip:
                        raise


class StreamBatches:
    """The batches of one process.

    Args:
        rank, ranks: number of this process, and of all.
    """

    def __init__(self, examples: StreamExamples, rank: int, ranks: int, batch_size: int) -> None:
        self.examples = examples
        self.rank = rank
        self.ranks = ranks
        self.batch_size = batch_size
        data = examples.data
        self._problems = Problems(examples.source.title, True, data.skip_limit)
        self._seen = 0
        self._next = -1
        self._samples: Iterator[FramedSample | Failure] | None = None
        readers = ranks * max(1, data.workers)
        plan = examples.plan
        if rank == 0:
            logger.info("streaming %d shards in %d lanes, with %d readers", plan.shards, plan.lanes, readers)
            if plan.lanes % readers:
                logger.warning(
                    "several readers read the same shards, because %d lanes can't be shared evenly by %d readers "
                    "(processes x data.workers). For less reading, make data.lanes a multiple of the readers, and have "
                    "as many shards as lanes",
                    plan.lanes,
                    readers,
                )

    def batch(self, position: int) -> list[FramedSample]:
        """Return this process's samples of the batch at ``position``: one of every ``ranks`` samples.

        Args:
            position: in samples of all processes together. Another one than the last batch's end starts anew there.

        Raises:
            UserError: a sample or a shard can't be used.
        """
        if position != self._next or self._samples is None:
            self._start(position)
        assert self._samples is not None
        samples = [self._read(self._samples) for _ in range(self.batch_size)]
        self._next = position + self.ranks * self.batch_size
        return samples

    def encoded(self, position: int) -> tuple[Tensor, Conditioning]:
        """Return latents and conditions of :meth:`batch`. Workers decode the next batches meanwhile."""
        return self.examples.encode(self.batch(position))

    def close(self) -> None:
        """End the workers."""
        self._samples, self._next = None, -1

    def _start(self, position: int) -> None:
        self.close()
        if position and self.rank == 0:
            logger.info(
                "the stream goes on at sample %d; shards of this epoch that were not read to their end are read again, "
                "without decoding",
                position,
            )
        positions = Positions(self.examples.reader(), position + self.rank, self.ranks)
        self._samples = open_positions(positions, self.examples.data.workers, 2 * self.batch_size)

    def _read(self, samples: Iterator[FramedSample | Failure]) -> FramedSample:
        found = next(samples)
        if isinstance(found, Failure):
            raise UserError(found.message)
        self._count(found.problems)
        return found

    def _count(self, problems: Mapping[str, str]) -> None:
        """Log the samples that were left out, and check data.skip_limit from time to time."""
        for message in problems.values():
            self._problems.add(message)
            logger.warning("left out: %s", message)
        self._seen += 1 + len(problems)
        if self._seen % CHECKED < 1 + len(problems):
            self._problems.check(self._seen)


def _companion(name: str, sample: FramedSample) -> Tensor:
    """Return a companion as tasks take it: a mask as (1, H, W) in 0..1, a picture as (3, H, W) in [-1, 1]."""
    pixels = picture_signed(sample.beside[name])
    return pixels[:1] / 2 + 0.5 if name == "mask" else pixels


def fingerprint(source: Source, data: DataSection, companions: Sequence[str], *, with_places: bool = False) -> str:
    """Return a hash of the names of the shards and of how they are read: 16 hexadecimal digits.

    Contents are not read: a stream may be larger than anything that could be hashed.

    Args:
        with_places: the folders and servers of the shards count too.
    """
    names: object = source.title if with_places else len(source)
    if isinstance(source, Shards):
        names = [shown(path) if with_places else file_name(path) for path in source.paths]
    facts = ("stream", data.source, data.caption_field, data.caption_prefix, tuple(companions), names)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
