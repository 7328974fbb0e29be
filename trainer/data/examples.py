"""Training examples in memory: latents and the conditions of their captions, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ..config import DataSection
from .sources import Sample, read_samples, to_tensor

if TYPE_CHECKING:
    from ..teachers.base import Teacher


@dataclass(frozen=True)
class Examples:
    """N encoded samples on the CPU.

    Attributes:
        latents: (N, C, h, w).
        captions: N texts.
        conditioning: of the M distinct captions; what a task makes from a picture (masks, edges) would be per sample.
        row: (N,) each sample's row of ``conditioning``.
    """

    latents: Tensor
    captions: tuple[str, ...]
    conditioning: Conditioning
    row: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: Tensor, device: torch.device | str) -> tuple[Tensor, Conditioning]:
        """Latents (B, C, h, w) and conditions of the samples at ``index`` (B,), on ``device``."""
        return self.latents[index].to(device), self.conditioning.rows(self.row[index]).to(device)

    def prompts(self, count: int) -> list[str]:
        """The first ``count`` distinct captions."""
        return list(dict.fromkeys(self.captions))[:count]


@torch.no_grad()
def encode_examples(data: DataSection, teacher: Teacher) -> Examples:
    """Read all samples and encode pictures and captions with the teacher's own encoders."""
    latents: list[Tensor] = []
    captions: list[str] = []
    for samples in _batches(read_samples(data), data.encode_batch):
        images = torch.stack([to_tensor(sample.image, teacher.resolution) for sample in samples])
        latents.append(teacher.encode(images.to(teacher.device)).cpu())
        captions.extend(sample.caption for sample in samples)
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
    )


def _batches(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while batch := list(islice(samples, size)):
        yield batch
