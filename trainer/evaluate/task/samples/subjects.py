"""Draw the samples of a task's evaluation: pictures with captions, each with its own conditions and noise.

Conditions are drawn sample by sample, so neither the number of samples nor the batch size changes a sample.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ....config import DataSection
from ....data.framing import to_mask, to_tensor
from ....data.reading import read_samples, source_of
from ....data.reading.samples import Sample
from ....demo.shards import TEACHER_STYLE, load_pictures
from ....errors import UserError
from ....seeds import seed_of, stream

if TYPE_CHECKING:
    from ....tasks.base import Task
    from ...request import Options

DEMO = "demo"  # value of --data for the demo's pictures; demo:noto is another style


@dataclass(frozen=True)
class Subjects:
    """The pictures that samples are drawn from.

    Attributes:
        samples: in the order of use.
        origin: a description for the report.
        of_demo: whether these are the demo's pictures, in its teacher's style or another.
        shuffled: whether another seed gives them in another order.
    """

    samples: tuple[Sample, ...]
    origin: str
    of_demo: bool = False
    shuffled: bool = False

    def fingerprint(self) -> str:
        """Return a hash of the pictures' pixels, their companions and captions: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for name, picture in sorted({"image": sample.image, **sample.companions}.items()):
                digest.update(f"{name} {picture.mode} {picture.size}:".encode() + picture.tobytes())
            digest.update(f"{sample.caption}:".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Batch:
    """B samples; pictures are (B, 3, H, W) in [-1, 1], on the CPU.

    Attributes:
        others: for each sample another picture.
        drawn: the task's condition pictures, see ``Task.draw``.
        seeds: of the noise that every run starts from.
        independent: seeds of other noise, for the set that runs are measured against.
    """

    images: Tensor
    others: Tensor
    captions: tuple[str, ...]
    drawn: Mapping[str, Tensor]
    seeds: tuple[int, ...]
    independent: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)


def read_subjects(data: str | DataSection, task: Task, samples: int, seed: int) -> Subjects:
    """Read the pictures to evaluate on, at most ``samples``.

    Args:
        data: ``demo``, ``demo:STYLE``, a folder of pictures with captions, shards, or a recipe's section. The demo's
            pictures are shuffled with ``seed``, other pictures keep their order.

    Raises:
        UserError: there are fewer than two pictures.
    """
    if isinstance(data, DataSection) and data.source == "demo":
        data = DEMO
    if isinstance(data, str) and (data == DEMO or data.startswith(f"{DEMO}:")):
        found = _demo(data.partition(":")[2] or TEACHER_STYLE, task, samples, seed)
    else:
        section = data if isinstance(data, DataSection) else _section(Path(data))
        section = section.model_copy(update={"limit": min(samples, section.limit or samples)})
        read = tuple(read_samples(section, task.companions))
        words = "under their captions" if task.reads_text else "without captions"
        trained = ", which the run was trained on" if isinstance(data, DataSection) else ""
        origin = f"the first {len(read)} pictures of {section.path or section.source}{trained}, {words}"
        found = Subjects(read, origin, section.source.startswith(DEMO))
    if len(found.samples) < 2:
        raise UserError(f"--data: {data} holds {len(found.samples)} pictures; an evaluation needs at least 2")
    return found


def read_sets(data: str | DataSection, task: Task, options: Options) -> list[Subjects]:
    """Read the pictures of each of ``options.seeds`` sets of samples; sets share pictures that no seed shuffles.

    Raises:
        UserError: there are fewer than two pictures.
    """
    first = read_subjects(data, task, options.samples, options.seed)
    others = range(options.seed + 1, options.seed + options.seeds)
    return [first, *(read_subjects(data, task, options.samples, seed) if first.shuffled else first for seed in others)]


def batches(
    subjects: Subjects, task: Task, size: tuple[int, int], samples: int, seed: int, batch_size: int
) -> Iterator[Batch]:
    """Draw the samples, ``batch_size`` at a time. Fewer pictures than samples come again with other conditions.

    Args:
        size: (H, W) of the pictures, in pixels.
    """
    for first in range(0, samples, batch_size):
        yield _batch(subjects, task, size, range(first, min(first + batch_size, samples)), seed)


def _batch(subjects: Subjects, task: Task, size: tuple[int, int], rows: range, seed: int) -> Batch:
    count = len(subjects.samples)
    images, others, drawn, captions = [], [], [], []
    for row in rows:
        turn, place = divmod(row, count)
        sample = subjects.samples[place]
        # Another partner in every turn, never the picture itself.
        other = subjects.samples[(place + 1 + turn % (count - 1)) % count]
        image, partner = (to_tensor(each.image, size)[None] for each in (sample, other))
        beside = {
            name: (to_mask if name == "mask" else to_tensor)(picture, size)[None]
            for name, picture in sample.companions.items()
        }
        drawn.append(task.draw_for_evaluation(image, partner, beside, stream(seed, "evaluation conditions", row)))
        images.append(image)
        others.append(partner)
        captions.append(sample.caption if task.reads_text else "")
    return Batch(
        torch.cat(images),
        torch.cat(others),
        tuple(captions),
        {name: torch.cat([each[name] for each in drawn]) for name in drawn[0]},
        tuple(seed_of(seed, "evaluation noise", row) for row in rows),
        tuple(seed_of(seed, "independent noise", row) for row in rows),
    )


def _demo(style: str, task: Task, samples: int, seed: int) -> Subjects:
    """Return the demo's pictures under general captions: the teacher knows each picture by heart under its name."""
    try:
        pictures = load_pictures(style)
    except FileNotFoundError as error:
        raise UserError(f"--data: {error}") from error
    found = [
        Sample(f"{caption.code} of {style}", Image.fromarray(picture.permute(1, 2, 0).numpy()), (caption.general,))
        for picture, caption in zip(pictures.images, pictures.captions, strict=True)
        if not task.demo_captions or caption.general in task.demo_captions
    ]
    random.Random(f"{seed}").shuffle(found)
    found = found[:samples]
    known = "the teacher learnt from them" if style == TEACHER_STYLE else "a style that no teacher has seen"
    words = "under general captions" if task.reads_text else "without captions"
    return Subjects(
        tuple(found), f"{len(found)} of the demo’s pictures ({style}: {known}), {words}", True, shuffled=True
    )


def _section(path: Path) -> DataSection:
    """Return the data section of a folder of pictures or of shards."""
    return DataSection(source=source_of(path), path=path)
