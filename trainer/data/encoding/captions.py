"""Encode captions: each distinct caption once, found again in the manifests by its hash."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ....flash_core.denoiser import Conditioning
from ...progress import Progress
from ..cache.store import Keys, as_keys, sortable
from .examples import as_rows
from .passes import Chunk, Pass, Work
from .table import text_key

logger = logging.getLogger(__name__)


def encode_captions(work: Work, part: Pass, chunks: list[Chunk]) -> None:
    """Encode this process's share of the missing captions, until ``work.stop`` is asked."""
    mine = work.own(chunks)
    progress = Progress("encoding captions", "captions", sum(len(chunk.rows) for chunk in mine))
    texts = _texts(work, part.keys[np.concatenate([chunk.rows for chunk in mine])] if mine else part.keys[:0])
    cut: list[str] = []
    for chunk in mine:
        captions = [next(texts) for _ in chunk.rows]
        parts = []
        for first in range(0, len(captions), work.data.encode_batch):
            if work.stop.asked:
                return
            batch = captions[first : first + work.data.encode_batch]
            encoded = replace(work.teacher.encode_prompts(batch), size_ids=None)
            parts.append(encoded.to("cpu"))
            cut += [text for text, too_long in zip(batch, work.teacher.cut_prompts(batch), strict=True) if too_long]
            progress.advance(len(batch))
        part.store.write([key.tobytes() for key in part.keys[chunk.rows]], as_rows(Conditioning.cat(parts)))
    if cut:
        logger.warning(
            "%d captions are longer than the text encoder reads, and are cut; the first one begins with %r",
            len(cut), cut[0][:60],
        )  # fmt: skip


def _texts(work: Work, wanted: Keys) -> Iterator[str]:
    """Yield the captions whose keys are ``wanted``, in the order in which the samples have them."""
    order = np.argsort(sortable(wanted), kind="stable")
    present = sortable(wanted)[order]
    seen = np.zeros(len(wanted), bool)
    if not work.task.reads_text:
        yield from [""] * len(wanted)
        return
    for unit in range(len(work.source)):
        if seen.all():
            return
        for captions in work.manifests.load(unit).captions:
            for caption in captions:
                at = np.searchsorted(present, sortable(as_keys([text_key(caption)])))[0]
                if at < len(present) and present[at] == text_key(caption) and not seen[at]:
                    seen[at] = True
                    yield caption
