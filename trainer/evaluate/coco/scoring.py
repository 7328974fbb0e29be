"""Measure FID and CLIP score of pictures on disk; features are summed up, never kept all at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...files import fingerprint_texts, write_whole
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
    """The networks of the metrics.

    Attributes:
        inception: maps (B, 3, 299, 299) with values around 0..255 to features (B, D).
        inception_hash: hash of Inception's weights file.
        clip: the CLIP scorer; None = no CLIP score.
    """

    inception: torch.nn.Module
    inception_hash: str
    clip: ClipScorer | None

    def to(self, device: torch.device | str) -> Networks:
        """Move the networks to a device; return the networks."""
        self.inception.to(device)
        if self.clip is not None:
            self.clip.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.inception.parameters()).device


def load_networks(inception: Path | None, clip: str | None) -> Networks:
    """Load Inception and CLIP on the CPU.

    Args:
        inception: FID's weights; None = the published file.
        clip: folder or Hub name of a CLIP; None = no CLIP score.

    Raises:
        UserError: a network can't be loaded.
    """
    from ...metrics.clip_score import ClipScorer
    from ...metrics.inception import load_inception

    network, digest = load_inception(inception, "cpu")
    return Networks(network, digest, ClipScorer.load(clip, "cpu") if clip is not None else None)


def reference_moments(
    coco: Coco, protocol: CocoProtocol, networks: Networks, stored: Path, progress: Progress
) -> Moments:
    """Return the moments of COCO's own pictures, from the file ``stored`` if it fits; else compute and store them."""
    from safetensors.torch import save_file

    origin = {
        "version": str(STATISTICS_VERSION),
        "pictures": fingerprint_texts([f"{path.name} {path.stat().st_size}" for path in coco.pictures]),
        "count": str(len(coco.pictures)),
        "framing": WORDS.format(size=protocol.size),
        "inception": networks.inception_hash,
    }
    if stored.is_file() and (found := _stored_moments(stored, origin)) is not None:
        return found
    task = progress.add_task("COCO's pictures", total=len(coco.pictures), unit="pictures")
    moments: Moments | None = None
    for pictures in _read(coco.pictures, protocol.size):
        seen = _moments(pictures, networks)
        moments = seen if moments is None else moments + seen
        progress.advance(task, len(pictures))
    assert moments is not None  # read_coco found pictures
    tensors = {"sum": moments.sum, "products": moments.products}
    write_whole(stored, lambda path: save_file(tensors, path, origin))
    return moments


def _stored_moments(stored: Path, origin: Mapping[str, str]) -> Moments | None:
    """Return the moments in a file; None, with a warning, if the file is damaged or was made from something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(stored, "pt") as file:
            header = file.metadata() or {}
            different = [name for name, value in origin.items() if header.get(name) != value]
            if not different:
                found = Moments(int(origin["count"]), file.get_tensor("sum"), file.get_tensor("products"))
                if bool(found.sum.isfinite().all()) and found.products.shape == (len(found.sum), len(found.sum)):
                    return found
                different = ["sum and products"]
    except (SafetensorError, OSError) as error:
        logger.warning("The statistics in %s can't be read (%s); they are made anew.", stored, error)
        return None
    logger.warning(
        "The statistics in %s do not fit this evaluation (%s); they are made anew.", stored, ", ".join(different)
    )
    return None


def measure_folder(
    folder: PictureFolder,
    run: SamplingSetting,
    captions: Sequence[Caption],
    reference: Moments,
    protocol: CocoProtocol,
    networks: Networks,
    progress: Progress,
) -> dict[str, Any]:
    """Return a run's line in the report.

    Raises:
        UserError: pictures are missing or damaged.
    """
    if missing := folder.missing(caption.number for caption in captions):
        raise UserError(f"{folder.folder} lacks {len(missing)} of {len(captions)} pictures; run the command again")
    task = progress.add_task(f"measuring {run.label}", total=len(captions), unit="pictures")
    moments: Moments | None = None
    cosines = 0.0
    paths = [folder.path(caption.number) for caption in captions]
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
        "seconds_per_image": folder.seconds_per_picture(),
    }


def _read(paths: Sequence[Path], size: int) -> Iterator[list[Image.Image]]:
    """Read pictures at the protocol's size, in batches; the next batch is read while a batch is measured."""

    def one(path: Path) -> Image.Image:
        return square(open_picture(path), size)

    with ThreadPoolExecutor(READERS) as pool:
        ahead: list[Future[Image.Image]] = []
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
