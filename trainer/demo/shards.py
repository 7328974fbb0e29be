"""Write and read the demo's pictures: WebDataset shards of (webp, txt, json) triples.

There is one shard per style. A sample's key is the emoji's code point, so one key is one subject in every style.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .assets import DATA

if TYPE_CHECKING:
    import torch
    from PIL import Image

TEACHER_STYLE = "fluent3d"  # the teacher draws this style; the others are for style LoRAs and evaluation
SIZE = 128  # pixels, width and height
WEBP_QUALITY = 90


@dataclass(frozen=True)
class Caption:
    """The subject, the style and the licence of one picture."""

    code: str  # code point(s) in lower-case hexadecimal, "1f436"
    name: str  # the subject's CLDR short name, lower case: "dog face"
    general: str  # a caption shared by all pictures of its category: "animal face"
    category: str
    style: str
    license: str  # SPDX identifier


@dataclass(frozen=True)
class Pictures:
    """The pictures of a style in memory: `images` (N, 3, H, W) uint8, and N captions."""

    images: torch.Tensor
    captions: list[Caption]

    def __len__(self) -> int:
        return len(self.captions)


def shard_path(style: str, folder: Path = DATA) -> Path:
    """Return the path of a style's shard."""
    return folder / f"{style}-000000.tar.gz"


def write_shard(samples: Iterable[tuple[Caption, Image.Image]], path: Path) -> int:
    """Write pictures as one gzipped shard and return their number.

    gzip is for the tar headers, which are larger than such small files. The bytes depend only on the samples: the shard
    records no time, user or host.
    """
    count = 0

    def write(partial: Path) -> None:
        nonlocal count
        count = _fill_shard(samples, partial)

    write_whole(path, write)
    return count


def _fill_shard(samples: Iterable[tuple[Caption, Image.Image]], partial: Path) -> int:
    import webdataset

    count = 0
    with partial.open("wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as stream:
        writer = webdataset.TarWriter(stream, encoder=False, mtime=0, user="", group="")
        for caption, image in samples:
            webp = io.BytesIO()
            image.save(webp, "WEBP", quality=WEBP_QUALITY, method=6)
            writer.write(
                {
                    "__key__": caption.code,
                    "webp": webp.getvalue(),
                    "txt": caption.name.encode(),
                    "json": json.dumps(asdict(caption), sort_keys=True).encode(),
                }
            )
            count += 1
        writer.close()
    return count


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a WebDataset shard in its order, each as ``__key__`` and suffix -> bytes."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    # WebDataset's own reader leaves the file open.
    with path.open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))


def load_pictures(style: str = TEACHER_STYLE, folder: Path = DATA) -> Pictures:
    """Read a style's pictures, in the shard's order.

    Raises:
        FileNotFoundError: there is no shard of the style.
    """
    import torch
    from PIL import Image

    from ..pictures import picture_bytes

    path = shard_path(style, folder)
    if not path.is_file():
        present = sorted(p.name.split("-")[0] for p in folder.glob("*-000000.tar.gz"))
        raise FileNotFoundError(
            f"no pictures of style {style!r} in {folder}; the styles there: {', '.join(present) or 'none'}. Choose one "
            "of them, or build the shards with `flash-diffusion demo data`"
        )
    images, captions = [], []
    for sample in read_records(path):
        images.append(picture_bytes(Image.open(io.BytesIO(sample["webp"])).convert("RGB")))
        captions.append(Caption(**json.loads(sample["json"])))
    return Pictures(torch.stack(images), captions)
