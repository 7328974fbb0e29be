"""FID and CLIP score of pictures on disk: read, shown to the networks, and added up; never all features at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...files import fingerprint_texts
from ...metrics.distances import Moments
from ..generate import SamplingSetting
from .captions import Caption, Coco
from .framing import WORDS, for_inception, open_picture, square
from .picture_folder import PictureFolder
from .protocols import CocoProtocol

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from rich.progress import Progress

    from ...metrics.clip_score import ClipScorer

logger = logging.getLogger(__name__)

AT_ONCE = 32  # pictures shown to Inception and CLIP in one batch
READERS = 8  # threads that read and resize pictures
STATISTICS_VERSION = 1  # of the file with the moments of COCO's pictures


@dataclass(frozen=True)
class Networks:
    """What looks at the pictures.

    Attributes:
        inception: (B, 3, 299, 299) with values around 0..255 to features (B, D).
        inception_hash: of its weights' file.
        clip: the scorer, or None where CLIP is not wanted.
    """

    inception: torch.nn.Module
    inception_hash: str
    clip: ClipScorer | None

    def to(self, device: torch.device | str) -> Networks:
        """The same on a device."""
        self.inception.to(device)
        if self.clip is not None:
            self.clip.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(self.inception.parameters()).device


def load_networks(inception: Path | None, clip: str | None) -> Networks:
    """Inception and CLIP, on the CPU.

    Args:
        inception: FID's weights; None is the published file.
        clip: a CLIP's folder or Hub name; None leaves CLIP out.

    Raises:
        UserError: one can't be had.
    """
    from ...metrics.clip_score import ClipScorer
    from ...metrics.inception import load_inception

    network, digest = load_inception(inception, "cpu")
    return Networks(network, digest, ClipScorer.load(clip, "cpu") if clip is not None else None)


def reference_moments(
    coco: Coco, protocol: CocoProtocol, networks: Networks, stored: Path, progress: Progress
) -> Moments:
    """The moments of COCO's own pictures; kept in the file ``stored``, which later evaluations take them from."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    origin = {
        "version": str(STATISTICS_VERSION),
        "pictures": fingerprint_texts([f"{path.name} {path.stat().st_size}" for path in coco.pictures]),
        "count": str(len(coco.pictures)),
        "framing": WORDS.format(size=protocol.size),
        "inception": networks.inception_hash,
    }
    if stored.is_file():
        with safe_open(stored, "pt") as file:
            header = file.metadata() or {}
            if all(header.get(name) == value for name, value in origin.items()):
                return Moments(len(coco.pictures), file.get_tensor("sum"), file.get_tensor("products"))
        different = [name for name, value in origin.items() if header.get(name) != value]
        logger.warning("The statistics in %s are of something else (%s); made anew.", stored, ", ".join(different))
    task = progress.add_task("COCO's pictures", total=len(coco.pictures), unit="pictures")
    moments: Moments | None = None
    for pictures in _read(coco.pictures, protocol.size):
        seen = _moments(pictures, networks)
        moments = seen if moments is None else moments + seen
        progress.advance(task, len(pictures))
    assert moments is not None  # read_coco found pictures
    stored.parent.mkdir(parents=True, exist_ok=True)
    partial = stored.with_name(f"{stored.name}.part")
    save_file({"sum": moments.sum, "products": moments.products}, partial, origin)
    os.replace(partial, stored)
    return moments


def measure(
    gallery: PictureFolder,
    run: SamplingSetting,
    captions: Sequence[Caption],
    reference: Moments,
    protocol: CocoProtocol,
    networks: Networks,
    progress: Progress,
) -> dict[str, Any]:
    """A run's line in the report.

    Raises:
        UserError: pictures are missing or damaged.
    """
    if missing := gallery.missing(caption.number for caption in captions):
        raise UserError(f"{gallery.folder} lacks {len(missing)} of {len(captions)} pictures; run the command again")
    task = progress.add_task(f"measuring {run.label}", total=len(captions), unit="pictures")
    moments: Moments | None = None
    cosines = 0.0
    paths = [gallery.path(caption.number) for caption in captions]
    for index, pictures in enumerate(_read(paths, protocol.size)):
        seen = _moments(pictures, networks)
        moments = seen if moments is None else moments + seen
        if networks.clip is not None:
            first = index * AT_ONCE
            texts = [protocol.caption_prefix + caption.text for caption in captions[first : first + len(pictures)]]
            cosines += float(networks.clip(pictures, texts).double().sum())
        progress.advance(task, len(pictures))
    assert moments is not None  # there are captions
    return {
        "name": run.label,
        **asdict(run),
        "nfe": run.nfe,
        "fid": moments.distance(reference),
        "clip": cosines / len(captions) if networks.clip is not None else None,
        "seconds_per_image": gallery.seconds_per_picture(),
    }


def _read(paths: Sequence[Path], size: int) -> Iterator[list[Image.Image]]:
    """Pictures at the protocol's size, in batches; the next batch is read while one is looked at."""

    def one(path: Path) -> Image.Image:
        return square(open_picture(path), size)

    with ThreadPoolExecutor(READERS) as pool:
        ahead = []
        for begin in range(0, len(paths), AT_ONCE):
            batch = [pool.submit(one, path) for path in paths[begin : begin + AT_ONCE]]
            if ahead:
                yield [future.result() for future in ahead]
            ahead = batch
        yield [future.result() for future in ahead]


def _moments(pictures: Sequence[Image.Image], networks: Networks) -> Moments:
    import torch

    pixels = torch.stack([for_inception(picture) for picture in pictures]).to(networks.device)
    with torch.inference_mode():
        return Moments.of(networks.inception(pixels).cpu())
