"""Encode pictures and a task's conditions; let the teacher draw pictures of prompts.

Files are read in the order of the source. Other threads decode and scale them while a batch is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ....flash_core.distiller import Distiller
from ...progress import Progress
from ...seeds import stream
from ...teachers.base import full_precision
from ...teachers.in_memory.stages import PICTURES
from ..cache.manifest import content_key, usable
from ..cache.store import Keys, Store
from ..framing import to_mask, to_tensor
from ..reading import decode
from ..reading.samples import BadSample, RawSample
from .examples import LATENTS, as_rows, from_rows, joined, packed
from .lookahead import load_and_compute
from .passes import Chunk, Pass, Work, changed
from .table import SampleTable

if TYPE_CHECKING:
    from ...tasks.base import Task
    from ...teachers.base import Teacher


@dataclass(frozen=True)
class Batch:
    """Rows of one chunk that are encoded together.

    Attributes:
        chunk: number of the chunk.
        rows: their numbers.
        samples: for each row its sample's number and its undecoded sample.
        frame: (height, width) in pixels.
    """

    chunk: int
    rows: list[int]
    samples: list[tuple[int, RawSample]]
    frame: tuple[int, int]


@dataclass(frozen=True)
class Loaded:
    """The decoded pictures of a batch.

    Attributes:
        rows: numbers of the rows whose pictures could be decoded.
        images: (B, 3, H, W) in [-1, 1].
        beside: companion -> (B, C, H, W).
        bad: number of a sample -> message, for the others.
    """

    rows: list[int]
    images: Tensor
    beside: Mapping[str, Tensor]
    bad: Mapping[int, str]


class PictureEncoder:
    """Encodes the pictures of a table.

    Attributes:
        bad: number of a sample -> message, for the samples that could not be decoded.
    """

    def __init__(self, work: Work, table: SampleTable) -> None:
        self.work = work
        self.table = table
        self.bad: dict[int, str] = {}

    # -- what the encoders make ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def latents(self, loaded: Loaded, keys: Keys) -> dict[str, Tensor]:
        return {LATENTS: self.work.teacher.encode(loaded.images.to(self.work.teacher.device))}

    @torch.no_grad()
    def conditions(self, loaded: Loaded, keys: Keys) -> dict[str, Tensor]:
        """Draw each row's conditions from a random stream of its own, and encode them together, in full precision."""
        streams = [stream(0, "condition", key.tobytes().hex()) for key in keys]
        return as_rows(drawn_conditions(self.work.task, self.work.teacher, loaded.images, loaded.beside, streams))

    @torch.no_grad()
    def solutions(self, text: Store, loaded: Loaded, keys: Keys) -> dict[str, Tensor]:
        """Let the teacher draw a picture of each prompt, with guidance of the recipe's range and noise of its own."""
        device, count = self.work.teacher.device, len(keys)
        captions = self.table.texts[self.table.first_text[loaded.rows]]
        conditioning = from_rows(text.read(text.find(captions))).to(device)
        conditioning = self.work.teacher.with_size(conditioning, self.table.frames[0])
        streams = [stream(0, "solution", key.tobytes().hex()) for key in keys]
        low, high = self.work.method.guidance
        noise = torch.stack([torch.randn(self.work.teacher.latent_shape, generator=own) for own in streams]).to(device)
        guidance = torch.stack([low + (high - low) * torch.rand((), generator=own) for own in streams]).to(device)
        distiller = Distiller(self.work.teacher.denoiser, self.work.method.settings())
        with self.work.accelerator.autocast() if self.work.accelerator is not None else nullcontext():
            z0 = distiller.teacher_solution(noise, conditioning, self.work.teacher.unconditional(count), guidance)
        return {LATENTS: z0.float()}

    def encode(self, part: Pass, chunks: list[Chunk], compute: Callable[[Loaded, Keys], dict[str, Tensor]]) -> None:
        """Encode this process's share of the missing rows, until ``work.stop`` is asked.

        Args:
            compute: makes the rows of decoded pictures: :meth:`latents`, :meth:`conditions` or :meth:`solutions`.
        """
        mine = self.work.own(chunks)
        progress = Progress(f"encoding {part.what}", part.kind, sum(len(chunk.rows) for chunk in mine))
        done: dict[int, list[tuple[list[int], dict[str, Tensor]]]] = {}
        left = {number: len(chunk.rows) for number, chunk in enumerate(mine)}

        def encode(_batch: Batch, loaded: Loaded) -> tuple[Loaded, dict[str, Tensor]]:
            rows = compute(loaded, part.keys[loaded.rows]) if loaded.rows else {}
            return replace(loaded, images=loaded.images[:0], beside={}), {k: v.cpu() for k, v in rows.items()}

        batches = self._batches(part, mine)
        for batch, (loaded, rows) in load_and_compute(
            batches, self._load, encode, self.work.teacher.device, self.work.data.workers
        ):
            self.bad |= loaded.bad
            done.setdefault(batch.chunk, []).append((loaded.rows, rows))
            left[batch.chunk] -= len(batch.rows)
            if left[batch.chunk] == 0:
                self._write(part, done.pop(batch.chunk))
            progress.advance(len(batch.rows))

    def _write(self, part: Pass, batches: list[tuple[list[int], dict[str, Tensor]]]) -> None:
        """Write a chunk's rows as a file."""
        rows = [row for numbers, _ in batches for row in numbers]
        if rows:
            conditions = [value for numbers, value in batches if numbers]
            if part.kind == "conditions":
                tensors = as_rows(joined([from_rows(value) for value in conditions]))
            else:
                tensors = {name: torch.cat([value[name] for value in conditions]) for name in conditions[0]}
            part.write(rows, tensors)

    def _batches(self, part: Pass, chunks: list[Chunk]) -> Iterator[Batch]:
        """Read the files of the chunks' samples, unit by unit, and yield the batches until ``stop`` is asked."""
        chunk_of = np.full(len(part.keys), -1, np.int32)
        for number, chunk in enumerate(chunks):
            chunk_of[chunk.rows] = number
        filling = {number: Batch(number, [], [], chunk.frame) for number, chunk in enumerate(chunks)}
        left = {number: len(chunk.rows) for number, chunk in enumerate(chunks)}
        copies = 1 if self.table.has_pictures else self.work.data.pictures_per_prompt
        for unit in range(len(self.table.unit_start) - 1):
            start, end = self.table.unit_start[unit : unit + 2].tolist()
            if not (chunk_of[start * part.variants : end * part.variants] >= 0).any():
                continue
            sample = start
            for raw in usable(self.work.source, unit):
                if sample == end:
                    break
                for _ in range(copies):
                    for row in range(sample * part.variants, (sample + 1) * part.variants):
                        number = int(chunk_of[row])
                        if number < 0:
                            continue
                        batch = filling[number]
                        batch.rows.append(row)
                        batch.samples.append((sample, raw))
                        left[number] -= 1
                        if len(batch.rows) == self.work.data.encode_batch or left[number] == 0:
                            filling[number] = Batch(number, [], [], batch.frame)
                            if self.work.stop.asked:
                                return
                            yield batch
                    sample += 1
            if sample < end:
                raise changed(self.work, unit, f"{self.work.source.title} has fewer samples than before")

    def _load(self, batch: Batch) -> Loaded:
        """Decode and frame the pictures of a batch."""
        rows: list[int] = []
        images: list[Tensor] = []
        beside: dict[str, list[Tensor]] = {}
        bad: dict[int, str] = {}
        framed: dict[int, tuple[Tensor, dict[str, Tensor]] | None] = {}
        for row, (number, raw) in zip(batch.rows, batch.samples, strict=True):
            if number not in framed:
                framed[number] = None
                try:
                    framed[number] = self._framed(number, raw, batch.frame)
                except BadSample as problem:
                    bad[number] = str(problem)
            found = framed[number]
            if found is None:
                continue
            rows.append(row)
            images.append(found[0])
            for name, picture in found[1].items():
                beside.setdefault(name, []).append(picture)
        empty = torch.empty(0, 3, *batch.frame)
        return Loaded(
            rows,
            torch.stack(images) if images else empty,
            {name: torch.stack(pictures) for name, pictures in beside.items()},
            bad,
        )

    def _framed(self, number: int, raw: RawSample, frame: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a sample's picture and companions, scaled and cut to the frame."""
        if raw.picture is None:
            return torch.empty(0), {}
        named = self.table.beside.items()
        given = [
            (raw.name, raw.picture, self.table.content),
            *((f"the {name} of {raw.name}", raw.companions.get(name), keys) for name, keys in named),
        ]
        for what, content, keys in given:
            if content_key(content) != keys[number].tobytes():
                unit = int(np.searchsorted(self.table.unit_start, number, side="right")) - 1
                raise changed(self.work, unit, f"{what} has changed")
        sample = decode(raw)
        beside = {
            name: (to_mask if name == "mask" else to_tensor)(picture, frame)
            for name, picture in sample.companions.items()
        }
        return to_tensor(sample.image, frame), beside


@torch.no_grad()
def drawn_conditions(
    task: Task, teacher: Teacher, images: Tensor, beside: Mapping[str, Tensor], streams: Sequence[torch.Generator]
) -> Conditioning:
    """Draw each sample's conditions from a random stream of its own, and encode them together, in full precision.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        beside: companion -> (B, C, H, W).
        streams: one for each sample.

    Returns:
        :func:`packed` conditions.
    """
    teacher.stages.enter(PICTURES)
    images = images.to(teacher.device)
    beside = {name: value.to(teacher.device) for name, value in beside.items()}
    with full_precision(teacher.device):
        drawn = [
            task.draw(images[row : row + 1], {name: value[row : row + 1] for name, value in beside.items()}, own)
            for row, own in enumerate(streams)
        ]
        together = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
        return packed(task.encode(together, teacher))
