"""Bring a recipe's samples into the cache, and return them: read, list, encode.

Three passes: read every file once, to know the samples (manifests); encode the captions; encode the pictures and the
task's conditions. The missing samples are cut into chunks, and a chunk becomes one file of the cache. Chunks depend on
the missing samples alone. So a killed run goes on with the chunks that are missing, and any number of processes writes
the same files.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from ...config import DataSection, MethodSection
from ...errors import UserError
from ...interrupts import StopRequest
from ...progress import size_in_words
from ...teachers.in_memory.stages import NETWORK
from ..cache.manifest import Manifest, Manifests
from ..cache.store import sortable
from ..cache.stores import (
    cache_root,
    caption_store,
    conditions_store,
    manifests_folder,
    pictures_store,
    solutions_store,
)
from ..reading import open_source
from ..reading.samples import Problems
from .buckets import bucket_sizes
from .captions import encode_captions
from .examples import CachedExamples
from .passes import Chunk, Pass, Work, row_bytes
from .pictures import PictureEncoder
from .table import SampleTable, build_table

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...tasks.base import Task
    from ...teachers.base import Teacher

logger = logging.getLogger(__name__)

SPARE_BYTES = 1 << 28  # that stay free on the disk


@torch.no_grad()
def prepare_examples(
    data: DataSection,
    teacher: Teacher,
    task: Task,
    variants: int = 1,
    *,
    method: MethodSection | None = None,
    solves: bool = True,
    accelerator: Accelerator | None = None,
    stop: StopRequest | None = None,
) -> CachedExamples:
    """Return the samples of a recipe's data; what the cache lacks is encoded now.

    Args:
        variants: random conditions of the task for each picture. They depend on picture, task and number alone.
        method: how the teacher draws pictures of prompts, for the source prompts.
        solves: False if prompts need no pictures, because trajectories are recorded.
        accelerator: all processes call this together.
        stop: asked between batches.

    Raises:
        UserError: the data can't be read, or the disk is full.
        Interrupted: ``stop`` was asked; everything encoded is in the cache.
    """
    manifests = manifests_of(data, task.companions)
    work = Work(data, teacher, task, variants, method or MethodSection(), manifests, accelerator, stop or StopRequest())
    return Preparation(work, solves=solves).run()


def manifests_of(data: DataSection, companions: Sequence[str]) -> Manifests:
    """Return the manifests of a recipe's data."""
    reading = repr((data.source, data.caption_prefix, data.caption_field))
    return Manifests(manifests_folder(data), open_source(data, companions), companions, reading)


def count_frames(
    data: DataSection, companions: Sequence[str], frames: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """Return how many samples each frame (height, width) gets; files that no manifest knows are read now."""
    manifests = manifests_of(data, companions)
    units = range(len(manifests.source))
    if data.limit is None:
        manifests.prepare(units, StopRequest())
    table = build_table(
        map(manifests.load, units), frames, companions, data.limit, reads_text=False, pictures_per_prompt=1
    )
    return table.counts()


class Preparation:
    """One call of :func:`prepare_examples`.

    Attributes:
        bad: name -> message of the samples that can't be used, those of all processes.
    """

    def __init__(self, work: Work, *, solves: bool) -> None:
        self.work = work
        self.solves = solves
        self.bad: dict[str, str] = {}

    def run(self) -> CachedExamples:
        """Read, encode and return the samples."""
        work = self.work
        table = self._table()
        passes = self._passes(table)
        chunks = [self._chunks(part, table) for part in passes]
        self._tell(passes, chunks, table)
        encoder = PictureEncoder(work, table)
        for part, missing in zip(passes, chunks, strict=True):
            if part.kind == "captions":
                encode_captions(work, part, missing)
            elif part.kind == "conditions":
                encoder.encode(part, missing, encoder.conditions)
            elif table.has_pictures:
                encoder.encode(part, missing, encoder.latents)
            else:
                work.teacher.stages.enter(NETWORK)
                with work.teacher.denoiser.role("teacher"):  # once for all threads: the role belongs to the network
                    encoder.encode(part, missing, partial(encoder.solutions, passes[0].store))
            self._meet()
        return self._examples(table, passes, encoder)

    def _examples(self, table: SampleTable, passes: list[Pass], encoder: PictureEncoder) -> CachedExamples:
        """Return the examples; samples that could not be decoded are left out."""
        places = [part.store.find(part.keys) for part in passes]
        there = np.ones(len(table), bool)
        for part, place in zip(passes[1:], places[1:], strict=True):
            there &= ~place.missing.reshape(len(table), part.variants).any(1)
        undecoded: dict[int, str] = {}
        for found in gather_object([encoder.bad]):
            undecoded |= found
        unreadable = np.zeros(len(table), bool)
        if undecoded:  # with their copies, which were not tried
            unreadable = np.isin(sortable(table.content), sortable(table.content[list(undecoded)]))
        if places[0].missing.any() or not (there | unreadable).all():
            raise UserError(
                f"rows have gone from the cache at {cache_root(self.work.data.cache)} while it was being filled; is it "
                "pruned at the same time? Run again"
            )
        if not there.all():
            copies = np.flatnonzero(~there)
            self.bad |= {f"sample {number}": "a copy of one of these pictures" for number in copies.tolist()}
            self.bad |= {f"sample {number}": message for number, message in undecoded.items()}
            self._complain_about_bad(int(there.sum()))
        if not there.any():
            raise UserError(f"data.path: {self.work.source.title} holds no samples that can be used")
        if not there.all():
            texts = np.repeat(there, np.diff(table.first_text))
            table = table.keep(there)
            kept = [texts, *(there.repeat(part.variants) for part in passes[1:])]
            places = [place.part(np.flatnonzero(rows)) for place, rows in zip(places, kept, strict=True)]
        text, found = passes[0], {part.kind: place for part, place in zip(passes, places, strict=True)}
        for part in passes:
            part.store.touch()
        stores = {part.kind: part.store for part in passes}
        return CachedExamples(
            self.work.teacher,
            table,
            found.get("pictures"),
            places[0],
            found.get("conditions"),
            (stores.get("pictures", text.store), text.store, stores.get("conditions", text.store)),
            self.work.variants,
            table.fingerprint(*(part.store.folder.name for part in passes), str(self.work.variants)),
        )

    # -- what there is -------------------------------------------------------------------------------------------------

    def _table(self) -> SampleTable:
        """Read the files that no manifest knows, and return the table of the samples."""
        data, team = self.work.data, self.work.processes
        units = range(len(self.work.source))
        if data.limit is None:
            self.work.manifests.prepare(units[team.process_index :: team.num_processes], self.work.stop)
        self._meet()
        # With a limit few units may do; then the first process reads them while the others wait, and all load them.
        with team.main_process_first():
            table = build_table(
                map(self._loaded, units),
                self._frames(),
                self.work.task.companions,
                data.limit,
                reads_text=self.work.task.reads_text,
                pictures_per_prompt=data.pictures_per_prompt,
            )
        self._complain_about_bad(len(table))
        if not len(table):
            raise UserError(f"data.path: {self.work.source.title} holds no samples that can be used")
        if not table.has_pictures and self.work.task.has_conditions:
            raise UserError(
                f"data.source: prompts have no pictures, and the task {self.work.task.name} makes its conditions of "
                "pictures; give a folder or shards of pictures"
            )
        return table

    def _loaded(self, unit: int) -> Manifest:
        manifest = self.work.manifests.load(unit)
        self.bad |= dict(manifest.problems)
        return manifest

    def _frames(self) -> list[tuple[int, int]]:
        height, width = self.work.teacher.resolution
        sizes = self.work.teacher.sizes
        if not self.work.data.buckets:
            return [(height, width)]
        frames = bucket_sizes(height, sizes.grain, sizes.most)
        for frame in frames:
            self.work.teacher.check_resolution(*frame)  # a ControlNet may take fewer sizes than the model
        return frames

    def _passes(self, table: SampleTable) -> list[Pass]:
        """Return what the run needs: captions, pictures unless trajectories stand for them, a task's conditions."""
        data, teacher, task, variants = self.work.data, self.work.teacher, self.work.task, self.work.variants
        keys = table.picture_keys()
        first = np.zeros(len(table.texts), np.int32)
        passes = [Pass("captions", "captions", caption_store(data, teacher), table.texts, first)]
        if table.has_pictures:
            passes.append(Pass("pictures", "pictures", pictures_store(data, teacher), keys, table.frame))
        elif self.solves:
            store = solutions_store(data, teacher, self.work.method, self.work.precision)
            passes.append(Pass("pictures", "pictures that the teacher draws", store, keys, table.frame))
        if task.has_conditions:
            store, what = conditions_store(data, teacher, task), f"conditions of {task.name}"
            keys = table.condition_keys(keys, variants)
            passes.append(Pass("conditions", what, store, keys, table.frame.repeat(variants), variants))
        return passes

    def _chunks(self, part: Pass, table: SampleTable) -> list[Chunk]:
        """Return the chunks that a store lacks. The first process looks, for all."""
        shared: list[list[Chunk]] = [[]]
        if self.work.processes.is_main_process:
            shared = [part.missing_chunks(table.frames, row_bytes(part, self.work.teacher, self.work.task))]
        broadcast_object_list(shared)
        return shared[0]

    def _tell(self, passes: list[Pass], chunks: list[list[Chunk]], table: SampleTable) -> None:
        """Log what there is and what is encoded now, and check that the disk can hold it.

        Raises:
            UserError: the disk is too small.
        """
        if not self.work.processes.is_main_process:
            return
        folder = cache_root(self.work.data.cache)
        pictures, captions = (len(np.unique(sortable(keys))) for keys in (table.content, table.texts))
        kind = f"{pictures} different pictures" if table.has_pictures else "prompts without pictures"
        variants = f", each with {self.work.variants} variants of its conditions" if self.work.variants > 1 else ""
        logger.info("%d samples of %s with %d different captions%s", len(table), kind, captions, variants)
        if self.work.data.buckets:
            sizes = ", ".join(f"{width} x {height}: {count}" for (height, width), count in table.counts().items())
            logger.info("buckets (width x height): %s", sizes)
        needed = 0
        for part, missing in zip(passes, chunks, strict=True):
            rows = sum(len(chunk.rows) for chunk in missing)
            size = rows * row_bytes(part, self.work.teacher, self.work.task)
            needed += size
            if rows:
                logger.info("to encode: %d %s, about %s", rows, part.what, size_in_words(size))
        if not needed:
            logger.info("all of it is in the cache at %s", folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        logger.info("the cache is at %s; %s are free there", folder, size_in_words(free))
        if needed + SPARE_BYTES > free:
            raise UserError(
                f"the encoded data take about {size_in_words(needed)}, and {folder} has {size_in_words(free)} free; "
                "set data.cache to a folder on a larger disk, data.cache_dtype to bfloat16 for half the size, or "
                "data.limit; `flash-diffusion cache prune` removes data of other runs"
            )

    # -- processes and problems ----------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Wait for all processes; leave together if one was asked to stop."""
        if self.work.accelerator is not None:
            self.work.stop.check(self.work.accelerator)
        self.work.processes.wait_for_everyone()

    def _complain_about_bad(self, samples: int) -> None:
        """Raise for samples that can't be used, or log them, as ``data.on_error`` says.

        Args:
            samples: that can be used.
        """
        data = self.work.data
        problems = Problems(self.work.source.title, data.on_error == "skip", data.skip_limit)
        for message in self.bad.values():
            problems.add(message)
        problems.check(samples + len(self.bad))
        if self.bad and self.work.processes.is_main_process:
            logger.warning(problems.summary(samples + len(self.bad)))
