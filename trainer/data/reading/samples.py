"""A sample as it is read (bytes), a sample as it is shown to a model (pictures), and the sources of samples.

A source reads and never decodes: bytes are hashed, looked up in the cache, and decoded only when they are encoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from ...errors import UserError

COMPANIONS = ("mask", "identity", "hint")  # pictures that belong to another picture and are no samples
SAME_SIZE = ("mask", "hint")  # companions that have as many pixels as their picture


class BadSample(UserError):
    """A sample that can't be used: unreadable, without a caption, with a wrong companion.

    Attributes:
        name: file or record, for messages.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Sample:
    """A picture with its captions.

    Attributes:
        name: file or record of the picture, for messages.
        image: RGB, upright, on white where it was transparent.
        captions: one or more texts; a text may be empty.
        companions: name -> RGB picture, for the requested companions that exist.
    """

    name: str
    image: Image.Image
    captions: tuple[str, ...]
    companions: Mapping[str, Image.Image] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


@dataclass(frozen=True)
class RawSample:
    """A sample as a source reads it: nothing is decoded.

    Attributes:
        name: file or record of the picture, for messages.
        picture: the bytes of the picture file; a picture in memory for the demo's; None for a prompt without a picture.
        captions: one or more texts, with the recipe's prefix; a text may be empty.
        companions: name -> the bytes of a picture file, or a picture in memory.
    """

    name: str
    picture: bytes | Image.Image | None
    captions: tuple[str, ...]
    companions: Mapping[str, bytes | Image.Image] = field(default_factory=dict)


class Source(Protocol):
    """Samples in a fixed order, in units that are read one after the other: files of a folder, or one shard."""

    @property
    def title(self) -> str:
        """The source in a few words, for messages: its path or name."""
        ...

    def __len__(self) -> int:
        """Return the number of units."""
        ...

    def stamp(self, unit: int) -> str | None:
        """Return a text that changes when a file of the unit changes: names, sizes, times. None: always read it."""
        ...

    def read(self, unit: int) -> Iterator[RawSample | BadSample]:
        """Yield the samples of a unit. A sample that can't be used is yielded as the error that says why.

        Raises:
            UserError: the whole unit can't be read; the message names the file.
        """
        ...
