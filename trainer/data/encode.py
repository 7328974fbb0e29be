"""Encode training examples once and keep them in memory: latents, conditions of captions, conditions of the task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ..config import DataSection
from ..seeds import stream
from .framing import to_mask, to_tensor
from .reading import read_samples
from .reading.samples import Sample

if TYPE_CHECKING:
    from ..tasks.base import Task
    from ..teachers.base import Teacher

HINT_LEVELS = 255  # of a channel: hints are kept as bytes


@dataclass(frozen=True)
class Examples:
    """N encoded pictures on the CPU, each with V variants of its task's conditions: N V samples.

    Attributes:
        latents: (N, C, h, w).
        captions: N texts.
        conditioning: of the M distinct captions.
        row: (N,) each picture's row of ``conditioning``.
        task: (N V) the task's conditions of the pictures, variant after variant of each; empty for text-to-image. Hints
            are bytes, see :func:`packed`.
        variants: V.
    """

    latents: Tensor
    captions: tuple[str, ...]
    conditioning: Conditioning
    row: Tensor
    task: Conditioning
    variants: int

    def __len__(self) -> int:
        return len(self.latents) * self.variants

    def batch(self, index: Tensor, device: torch.device | str) -> tuple[Tensor, Conditioning]:
        """Return latents (B, C, h, w) and conditions of the samples at ``index`` (B,), on ``device``."""
        picture = index // self.variants
        conditioning = self.conditioning.rows(self.row[picture]).to(device)
        return self.latents[picture].to(device), conditioning.joined(self.task_conditions(index, device))

    def task_conditions(self, index: Tensor, device: torch.device | str) -> Conditioning:
        """Return the task's conditions of the samples at ``index`` (B,), on ``device``, as networks take them."""
        conditioning = self.task.rows(index).to(device)
        if conditioning.hint is None:
            return conditioning
        return replace(conditioning, hint=(conditioning.hint.float() / HINT_LEVELS).expand(-1, 3, -1, -1))

    def first_samples(self, count: int) -> list[tuple[str, int]]:
        """Return captions and indices of the first samples with distinct captions, at most ``count``.

        Where a task has conditions of its own, samples with repeated captions follow, until there are ``count``.
        """
        first: dict[str, int] = {}
        for picture, caption in enumerate(self.captions):
            first.setdefault(caption, picture)
        pictures = list(first.values())
        if len(self.task):
            pictures += [picture for picture in range(len(self.captions)) if picture not in set(pictures)]
        return [(self.captions[picture], picture * self.variants) for picture in pictures[:count]]


@torch.no_grad()
def encode_examples(data: DataSection, teacher: Teacher, task: Task, variants: int = 1, seed: int = 0) -> Examples:
    """Read all samples and encode pictures, captions and the task's conditions with the teacher's own encoders.

    Args:
        variants: random conditions of the task for each picture.
        seed: seed of the random conditions.
    """
    generator = stream(seed, "task")
    latents: list[Tensor] = []
    captions: list[str] = []
    conditions: list[Conditioning] = []
    for samples in _batches(read_samples(data, task.companions), data.encode_batch):
        # A picture with several captions comes several times in a row: it is encoded once.
        pictures = {id(sample.image): sample.image for sample in samples}
        row = {key: index for index, key in enumerate(pictures)}
        rows = torch.tensor([row[id(sample.image)] for sample in samples])
        images = torch.stack([to_tensor(image, teacher.resolution) for image in pictures.values()]).to(teacher.device)
        latents.append(teacher.encode(images).cpu()[rows])
        images = images[rows]
        captions.extend(sample.caption if task.reads_text else "" for sample in samples)
        beside = {name: value.repeat_interleave(variants, 0) for name, value in _companions(samples, teacher).items()}
        repeated = images.repeat_interleave(variants, 0)
        conditions.append(packed(task.conditions(repeated, teacher, generator, beside)).to("cpu"))
    distinct = list(dict.fromkeys(captions))
    parts = [
        teacher.encode_prompts(distinct[first : first + data.encode_batch]).to("cpu")
        for first in range(0, len(distinct), data.encode_batch)
    ]
    position = {caption: index for index, caption in enumerate(distinct)}
    return Examples(
        torch.cat(latents),
        tuple(captions),
        Conditioning.cat(parts),
        torch.tensor([position[caption] for caption in captions]),
        joined(conditions),
        variants,
    )


def _companions(samples: list[Sample], teacher: Teacher) -> dict[str, Tensor]:
    """Return name -> companions (B, C, H, W) of the pictures, scaled and cut as the pictures are."""
    found: dict[str, Tensor] = {}
    for name in samples[0].companions:
        frame = to_mask if name == "mask" else to_tensor
        found[name] = torch.stack([frame(sample.companions[name], teacher.resolution) for sample in samples])
    return {name: value.to(teacher.device) for name, value in found.items()}


def packed(part: Conditioning) -> Conditioning:
    """Return a batch of a task's conditions with hints as bytes: (B, 3, H, W), or (B, 1, H, W) where all are grey.

    A hint of 1024 px takes 12 MB as float32, so each batch is packed before the next one is made.
    """
    if part.hint is None:
        return part
    hint = (part.hint * HINT_LEVELS).round().clamp(0, HINT_LEVELS).to(torch.uint8)
    grey = hint.shape[1] == 1 or bool((hint == hint[:, :1]).all())
    return replace(part, hint=hint[:, :1].clone() if grey else hint)


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """Join :func:`packed` conditions of several batches. Grey hints get three channels beside coloured ones."""
    if len({part.hint.shape[1] for part in parts if part.hint is not None}) > 1:
        parts = [replace(part, hint=part.hint.expand(-1, 3, -1, -1)) for part in parts if part.hint is not None]
    return Conditioning.cat(parts)


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, size)):
        yield batch
