"""Encode captions: each distinct caption once, found again in the manifests by its hash."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ....flash_core.denoiser import Conditioning
from ...progress import Progress
from ..cache.store import Keys, as_keys, sortable
from .examples import as_rows
from .passes import Chunk, Pass, Work, changed
from .table import text_key


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
            encoded = replace(work.teacher.encode_prompts(batch, warn=False), size_ids=None)
            parts.append(encoded.to("cpu"))
            cut += [text for text, too_long in zip(batch, work.teacher.cut_prompts(batch), strict=True) if too_long]
            progress.advance(len(batch))
        part.write(chunk.rows, as_rows(Conditioning.cat(parts)))
    work.teacher.warn_of_cut(cut, len(cut))


def _texts(work: Work, wanted: Keys) -> Iterator[str]:
    """Yield the captions whose keys are ``wanted``, in the order in which the samples have them.

    Raises:
        UserError: a caption has changed since the samples were listed.
    """
    if not work.task.reads_text:
        yield from [""] * len(wanted)
        return
    present = np.sort(sortable(wanted))
    seen = np.zeros(len(wanted), bool)
    unit = 0
    for unit in range(len(work.source)):
        if seen.all():
            return
        captions = [caption for captions in work.manifests.load(unit).captions for caption in captions]
        keys = sortable(as_keys(map(text_key, captions)))
        at = np.searchsorted(present, keys)
        hits = np.flatnonzero(present[np.minimum(at, len(present) - 1)] == keys)
        for number, place in zip(hits.tolist(), at[hits].tolist(), strict=True):
            if not seen[place]:
                seen[place] = True
                yield captions[number]
    if not seen.all():
        raise changed(work, unit, f"a caption of {work.source.title} has changed")
