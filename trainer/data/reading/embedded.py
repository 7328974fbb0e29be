"""Read the demo's embedded pictures, and the demo's swapped faces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...config import DataSection
from ...demo.assets import DATA
from ...demo.shards import TEACHER_STYLE, load_pictures, shard_path
from ...demo.swaps import swaps
from ...pictures import picture_from_bytes, picture_from_signed
from .samples import BadSample, LeftOut, RawSample


class Demo:
    """The demo's pictures, each twice in a row: with its name ("fox") and with its general caption ("animal face")."""

    title = "the demo"

    def __init__(self, data: DataSection) -> None:
        self._prefix = data.caption_prefix
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return 1

    def stamp(self, unit: int) -> str:
        """Return size and time of the demo's shard."""
        return _stamp(self.title)

    def read(self, unit: int) -> Iterator[RawSample | BadSample]:
        """Yield the samples."""
        pictures = load_pictures()
        for picture, caption in zip(pictures.images, pictures.captions, strict=True):
            image = picture_from_bytes(picture)
            for text in (caption.name, caption.general):
                yield RawSample(f"{caption.code} of the demo", image, (f"{self._prefix}{text}".strip(),))


class DemoSwaps:
    """The demo's swaps, with mask and identity as companions."""

    title = "the demo's swapped faces"

    def __init__(self, data: DataSection, companions: Sequence[str] = ()) -> None:
        self._prefix = data.caption_prefix
        self.left_out = LeftOut()
        self.companions = tuple(companions)

    def __len__(self) -> int:
        return 1

    def stamp(self, unit: int) -> str:
        """Return size and time of the demo's shard."""
        return _stamp(self.title)

    def read(self, unit: int) -> Iterator[RawSample | BadSample]:
        """Yield the samples."""
        for swap in swaps():
            beside = {"mask": swap.mask * 2 - 1, "identity": swap.identity}
            pictures = {name: picture_from_signed(beside[name]) for name in self.companions if name in beside}
            caption = f"{self._prefix}{swap.head} with the face of {swap.face}".strip()
            yield RawSample(swap.name, picture_from_signed(swap.image), (caption,), pictures)


def _stamp(title: str) -> str:
    status = shard_path(TEACHER_STYLE, DATA).stat()
    return f"{title}\0{status.st_size}\0{status.st_mtime_ns}"
