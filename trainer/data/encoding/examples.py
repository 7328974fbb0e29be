"""Encoded samples as training asks for them: latents and conditions of a batch, read from the cache or from memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ....flash_core.runs.transfer import sent
from ...seeds import seed_of
from ..cache.store import Places, Store
from .table import SampleTable

if TYPE_CHECKING:
    from ...teachers.base import Teacher

HINT_LEVELS = 255  # of a channel: hints are kept as bytes
NO_CAPTION = -1  # chosen instead of a caption: the empty prompt
LATENTS = "latents"


class Examples(Protocol):
    """N encoded samples on the CPU or on disk."""

    def __len__(self) -> int: ...

    def batch(
        self, index: Tensor, device: torch.device | str, caption: Tensor | None = None
    ) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and conditions of the samples at ``index`` (B,), on ``device``.

        Args:
            caption: (B,) number of the caption of each sample, ``NO_CAPTION`` for the empty prompt; default: the first.
        """
        ...


@dataclass(frozen=True)
class MemoryExamples:
    """N encoded pictures in memory, each with one caption.

    Attributes:
        latents: (N, C, h, w).
        conditioning: of the M distinct captions.
        row: (N,) each picture's row of ``conditioning``.
        task: (N) the task's conditions, :func:`packed`.
    """

    latents: Tensor
    conditioning: Conditioning
    row: Tensor
    task: Conditioning

    def __len__(self) -> int:
        return len(self.latents)

    def batch(
        self, index: Tensor, device: torch.device | str, caption: Tensor | None = None
    ) -> tuple[Tensor, Conditioning]:
        """Return latents and conditions of the samples at ``index``; every sample has one caption."""
        conditioning = self.conditioning.rows(self.row[index]).to(device)
        return self.latents[index].to(device), conditioning.joined(unpacked(self.task.rows(index).to(device)))


@dataclass(frozen=True)
class CachedExamples:
    """The samples of a run in the cache: N pictures, each with V variants of its task's conditions: N V samples.

    Attributes:
        teacher: gives the conditions of the empty prompt and of picture sizes.
        table: the N samples.
        latents: where the latents are; None for prompts without pictures, whose latents come with their trajectories.
        text: where the conditions of the table's M captions are.
        task: where the task's conditions of the N V samples are, variant after variant of each; None without any.
        stores: the stores of ``latents``, ``text`` and ``task``.
        variants: V.
        fingerprint: a hash of all contents.
    """

    teacher: Teacher
    table: SampleTable
    latents: Places | None
    text: Places
    task: Places | None
    stores: tuple[Store, Store, Store]
    variants: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.table) * self.variants

    @property
    def has_latents(self) -> bool:
        """False for prompts whose latents come with their trajectories."""
        return self.latents is not None

    @property
    def frames(self) -> Tensor:
        """(N V,) number of each sample's frame; samples of one frame can share a batch."""
        return torch.from_numpy(self.table.frame).long().repeat_interleave(self.variants)

    @property
    def distinct_captions(self) -> int:
        """The number of different captions."""
        return len(np.unique(np.stack([self.text.file, self.text.row], 1), axis=0))

    def caption_counts(self, index: Tensor) -> Tensor:
        """Return how many captions the samples at ``index`` (B,) have, (B,)."""
        picture = (index // self.variants).numpy()
        return torch.from_numpy(self.table.first_text[picture + 1] - self.table.first_text[picture])

    def latent_shape(self, frame: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a frame's latents."""
        height, width = self.table.frames[frame]
        scale = self.teacher.scale_factor
        return self.teacher.latent_shape[0], height // scale, width // scale

    def batch(
        self, index: Tensor, device: torch.device | str, caption: Tensor | None = None
    ) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and conditions of samples of one frame; without pictures the latents are 0.

        Raises:
            UserError: a file of the cache is damaged or gone.
        """
        picture = (index // self.variants).numpy()
        frame = int(self.table.frame[picture[0]])
        if self.latents is None:
            z0 = torch.zeros(len(index), *self.latent_shape(frame))
        else:
            z0 = self.stores[0].read(self.latents.part(picture))[LATENTS].float()
        conditioning = self._text(picture, caption, self.table.frames[frame], device)
        return sent(z0, device), conditioning.joined(self.task_conditions(index, device))

    def task_conditions(self, index: Tensor, device: torch.device | str) -> Conditioning:
        """Return the task's conditions of the samples at ``index`` (B,), on ``device``, as networks take them."""
        if self.task is None:
            return Conditioning()
        rows = self.stores[2].rows(self.task.part(index.numpy()))
        return unpacked(joined([from_rows(row) for row in rows]).to(device))

    def first_samples(self, count: int) -> list[tuple[str, int]]:
        """Return captions and indices of the first samples with distinct captions, at most ``count``.

        Where a task has conditions of its own, samples with repeated captions follow, until there are ``count``.
        """
        first: dict[str, int] = {}
        for picture, captions in enumerate(self.table.head):
            first.setdefault(captions[0], picture)
        pictures = list(first.values())
        if self.task is not None:
            pictures += [picture for picture in range(len(self.table.head)) if picture not in set(pictures)]
        return [(self.table.head[picture][0], picture * self.variants) for picture in pictures[:count]]

    def _text(
        self, picture: np.ndarray, caption: Tensor | None, frame: tuple[int, int], device: torch.device | str
    ) -> Conditioning:
        chosen = torch.zeros(len(picture), dtype=torch.long) if caption is None else caption
        at = self.table.first_text[picture] + chosen.clamp(min=0).numpy()
        text = from_rows(self.stores[1].read(self.text.part(at))).to(device)
        return text_of(text, chosen, self.teacher, frame)


def caption_at(seed: int, position: int, count: int, dropout: float) -> int:
    """Return the number of the caption of the sample at a position, ``NO_CAPTION`` for the empty prompt.

    Args:
        count: captions of the sample.
        dropout: share of empty prompts.
    """
    if seed_of(seed, "empty prompt", position) < dropout * 2**32:
        return NO_CAPTION
    return seed_of(seed, "caption", position) % count


def text_of(text: Conditioning, chosen: Tensor, teacher: Teacher, frame: tuple[int, int]) -> Conditioning:
    """Return the conditions of captions for pictures of a size, and of the empty prompt where it was chosen.

    Args:
        text: (B) without ``size_ids``.
        chosen: (B,) numbers of the captions, ``NO_CAPTION`` for the empty prompt.
        frame: (height, width) in pixels.
    """
    count = len(chosen)
    if (chosen == NO_CAPTION).any():
        empty = replace(teacher.unconditional(count), size_ids=None, image_tokens=None).to(teacher.device)
        text = Conditioning.cat([text, empty]).rows(torch.arange(count) + count * (chosen == NO_CAPTION))
    return teacher.with_size(text, frame)


# -- conditions as named rows --------------------------------------------------------------------------------------


def as_rows(conditioning: Conditioning) -> dict[str, Tensor]:
    """Return a batch of conditions as name -> rows, for a store."""
    parts = {part.name: getattr(conditioning, part.name) for part in fields(Conditioning) if part.name != "residuals"}
    return {name: value for name, value in parts.items() if value is not None}


def from_rows(rows: dict[str, Tensor]) -> Conditioning:
    """Return the conditions of :func:`as_rows`."""
    parts: dict[str, Any] = dict(rows)  # which of Conditioning's fields, only their names tell
    return Conditioning(**parts)


def packed(part: Conditioning) -> Conditioning:
    """Return a batch of a task's conditions with hints as bytes: (B, 3, H, W), or (B, 1, H, W) where all are grey.

    A hint of 1024 px takes 12 MB as float32, so each batch is packed before the next one is made.
    """
    if part.hint is None:
        return part
    hint = (part.hint * HINT_LEVELS).round().clamp(0, HINT_LEVELS).to(torch.uint8)
    grey = hint.shape[1] == 1 or bool((hint == hint[:, :1]).all())
    return replace(part, hint=hint[:, :1].clone() if grey else hint)


def unpacked(part: Conditioning) -> Conditioning:
    """Return :func:`packed` conditions as networks take them: hints (B, 3, H, W) in [0, 1]."""
    if part.hint is None:
        return part
    return replace(part, hint=(part.hint.float() / HINT_LEVELS).expand(-1, 3, -1, -1))


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """Join :func:`packed` conditions of several batches. Grey hints get three channels beside coloured ones."""
    if len({part.hint.shape[1] for part in parts if part.hint is not None}) > 1:
        parts = [replace(part, hint=part.hint.expand(-1, 3, -1, -1)) for part in parts if part.hint is not None]
    return Conditioning.cat(parts)
