"""The table of a run's samples: hashes of picture and captions, and the frame of each; about 50 bytes a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.manifest import NO_PICTURE, Manifest
from ..cache.store import KEY_BYTES, Keys, as_keys, key_of
from .buckets import nearest_bucket

HEAD = 1024  # first samples whose captions are kept, for previews


@dataclass(frozen=True)
class SampleTable:
    """N samples.

    Attributes:
        content: (N, 16) hashes of pictures.
        frame: (N,) number of each sample's frame in ``frames``.
        frames: (height, width) in pixels.
        beside: companion -> (N, 16) hashes.
        texts: (M, 16) hashes of the captions of all samples, sample after sample.
        first_text: (N + 1,) where each sample's captions begin in ``texts``.
        unit_start: (U + 1,) where each unit's samples begin.
        head: captions of the first samples.
        has_pictures: False for prompts without pictures.
    """

    content: Keys
    frame: NDArray[np.int32]
    frames: tuple[tuple[int, int], ...]
    beside: dict[str, Keys]
    texts: Keys
    first_text: NDArray[np.int64]
    unit_start: NDArray[np.int64]
    head: tuple[tuple[str, ...], ...]
    has_pictures: bool

    def __len__(self) -> int:
        return len(self.content)

    def counts(self) -> dict[tuple[int, int], int]:
        """Return frame (height, width) -> samples, without empty frames."""
        numbers = np.bincount(self.frame, minlength=len(self.frames)).tolist()
        return {frame: number for frame, number in zip(self.frames, numbers, strict=True) if number}

    def fingerprint(self, *more: str) -> str:
        """Return a hash of all samples in their order and of ``more``: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for array in (self.content, self.frame, *self.beside.values(), self.texts, self.first_text):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(repr((self.frames, sorted(self.beside), more)).encode())
        return digest.hexdigest()[:16]

    def keep(self, chosen: NDArray[np.bool_]) -> SampleTable:
        """Return the table of the chosen samples; ``unit_start`` counts them."""
        index = np.flatnonzero(chosen)
        counts = np.diff(self.first_text)
        texts = np.repeat(chosen, counts)
        before = np.concatenate([[0], np.cumsum(chosen)])
        return SampleTable(
            self.content[index],
            self.frame[index],
            self.frames,
            {name: keys[index] for name, keys in self.beside.items()},
            self.texts[texts],
            np.concatenate([[0], np.cumsum(counts[index])]).astype(np.int64),
            before[self.unit_start].astype(np.int64),
            tuple(captions for captions, kept in zip(self.head, chosen, strict=False) if kept),
            self.has_pictures,
        )

    def picture_keys(self) -> Keys:
        """Return the key of each sample's latents: its picture in its frame, (N, 16)."""
        return as_keys(
            key_of(content.tobytes(), *self.frames[frame])
            for content, frame in zip(self.content, self.frame.tolist(), strict=True)
        )

    def condition_keys(self, picture_keys: Keys, variants: int) -> Keys:
        """Return the keys of a task's conditions, variant after variant of each sample, (N V, 16)."""
        beside = [self.beside[name] for name in sorted(self.beside)]
        return as_keys(
            key_of(key.tobytes(), b"".join(keys[row].tobytes() for keys in beside), variant)
            for row, key in enumerate(picture_keys)
            for variant in range(variants)
        )


def text_key(caption: str) -> bytes:
    """Return the key of a caption's conditions."""
    return key_of("caption", caption)


def build_table(
    manifests: Iterator[Manifest],
    frames: Sequence[tuple[int, int]],
    companions: Sequence[str],
    limit: int | None,
    *,
    reads_text: bool,
    pictures_per_prompt: int,
) -> SampleTable:
    """Return the table of all manifests' samples, the first ``limit`` of them.

    Args:
        frames: the frames that pictures may have.
        reads_text: False makes every caption empty.
        pictures_per_prompt: samples of each prompt without a picture; each gets a hash of its own.
    """
    content, texts, sizes = Rows(np.uint8, KEY_BYTES), Rows(np.uint8, KEY_BYTES), Rows(np.int32, 2)
    first_text, starts = Rows(np.int64), [0]
    first_text.add(np.zeros(1, np.int64))
    captions_before = 0
    beside = {name: Rows(np.uint8, KEY_BYTES) for name in companions}
    head: list[tuple[str, ...]] = []
    empty = text_key("")
    counted = 0
    has_pictures = True
    for manifest in manifests:
        left = len(manifest) if limit is None else min(len(manifest), limit - counted)
        counted += left
        captions = manifest.captions[:left]
        repeat = 1
        keys = manifest.content[:left]
        if left and keys[0].tobytes() == NO_PICTURE:
            has_pictures = False
            repeat = pictures_per_prompt
            captions = [given for given in captions for _ in range(repeat)]
            keys = as_keys(key_of("prompt", given[0], n % repeat) for n, given in enumerate(captions))
        content.add(keys)
        sizes.add(manifest.sizes[:left].repeat(repeat, 0))
        for name, found in manifest.beside.items():
            beside[name].add(found[:left].repeat(repeat, 0))
        given = [[text_key(text) for text in sample] if reads_text else [empty] for sample in captions]
        texts.add(as_keys(key for sample in given for key in sample))
        ends = captions_before + np.cumsum([len(sample) for sample in given], dtype=np.int64)
        first_text.add(ends)
        captions_before = int(ends[-1]) if len(ends) else captions_before
        head += [tuple(sample) if reads_text else ("",) for sample in captions[: HEAD - len(head)]]
        starts.append(starts[-1] + len(captions))
        if counted == limit:
            break
    return SampleTable(
        content.array(),
        nearest_bucket(sizes.array(), list(frames)).astype(np.int32),
        tuple(frames),
        {name: keys.array() for name, keys in beside.items()},
        texts.array(),
        first_text.array(),
        np.array(starts, np.int64),
        tuple(head),
        has_pictures,
    )


class Rows:
    """Rows that come part by part. No second copy is made at the end, so that memory is not taken twice.

    Args:
        shape: of a row.
    """

    def __init__(self, dtype: type[np.generic], *shape: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self._content = bytearray()

    def add(self, rows: NDArray[Any]) -> None:
        """Add rows (n, ...)."""
        self._content += np.ascontiguousarray(rows, self.dtype).data.cast("B") if rows.size else b""

    def array(self) -> NDArray[Any]:
        """Return all rows (N, ...)."""
        return np.frombuffer(self._content, self.dtype).reshape(-1, *self.shape)
