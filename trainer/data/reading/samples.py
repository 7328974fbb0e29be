"""A sample as it is read (bytes), a sample as it is shown to a model (pictures), and the sources of samples.

A source reads and never decodes: bytes are hashed, looked up in the cache, and decoded only when they are encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from ...errors import UserError

COMPANIONS = ("mask", "identity", "hint")  # pictures that belong to another picture and are no samples
SAME_SIZE = ("mask", "hint")  # companions that have as many pixels as their picture


class BadSample(UserError):
    """A sample that can't be used: unreadable, without a caption, with a wrong companion.

    Attributes:
        name: file or record, for messages.
        kind: what is wrong: the picture, its caption or a companion.
    """

    def __init__(self, name: str, message: str, kind: Literal["picture", "caption", "companion"] = "picture") -> None:
        super().__init__(message)
        self.name = name
        self.kind = kind


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


@dataclass
class LeftOut:
    """What lies beside the samples and is not read.

    Attributes:
        suffixes: suffix, such as ``.heic`` -> number of files.
        captions: number of caption files without a picture.
        example: one of these.
        empty: number of empty prompts.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    example: str = ""
    empty: int = 0


class Source(Protocol):
    """Samples in a fixed order, in units that are read one after the other: files of a folder, or one shard."""

    @property
    def title(self) -> str:
        """The source in a few words, for messages: its path or name."""
        ...

    def __len__(self) -> int:
        """Return the number of units."""
        ...

    @property
    def left_out(self) -> LeftOut:
        """What is not read, of the units that were read so far."""
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


def uniform(
    samples: Iterable[RawSample | BadSample], companions: Sequence[str], first: Callable[[], tuple[str, frozenset[str]]]
) -> Iterator[RawSample | BadSample]:
    """Yield samples. A sample with other companions than the source's first sample becomes a BadSample.

    Args:
        first: returns name and companions of the source's first sample.
    """
    for sample in samples:
        problem = None
        if companions and isinstance(sample, RawSample):
            name, expected = first()
            for companion in companions:
                if (companion in sample.companions) != (companion in expected):
                    lacking, having = (sample.name, name) if companion in expected else (name, sample.name)
                    problem = BadSample(
                        sample.name,
                        f"{lacking} has no {companion} picture beside it, and {having} has one; give every picture "
                        f"its .{companion}.png, or remove them all, and the task draws its own",
                        "companion",
                    )
                    break
        yield problem or sample


class Problems:
    """The samples that can't be used, up to a limit.

    Args:
        title: the source in a few words.
        skip: leave samples out; False: one is too many.
        limit: the most samples to leave out: a share below 1, or a number from 1 on.
    """

    def __init__(self, title: str, skip: bool, limit: float) -> None:
        self.title = title
        self.skip = skip
        self.limit = limit
        self.count = 0
        self._first: list[str] = []  # messages, at most SHOWN_PROBLEMS

    def add(self, message: str) -> None:
        """Add the message of a sample that can't be used."""
        self.count += 1
        if len(self._first) < SHOWN_PROBLEMS:
            self._first.append(message)

    def check(self, total: int) -> None:
        """Check the limit.

        Args:
            total: number of all samples, with those that can't be used.

        Raises:
            UserError: too many samples can't be used; the message names the first ones and says what to do.
        """
        if self.count == 0:
            return
        if not self.skip:
            raise UserError(self.summary(total) + f"\n{FAIL_ADVICE}")
        most = self.limit if self.limit >= 1 else self.limit * total
        if self.count > most:
            allowed = f"{self.limit:g}" if self.limit >= 1 else f"{self.limit:.2%} of {total}"
            raise UserError(
                f"{self.summary(total)}\nThis is more than data.skip_limit allows ({allowed}); mend or remove them, or "
                "raise data.skip_limit"
            )

    def summary(self, total: int) -> str:
        """Return how many samples can't be used, and why, for the first ones."""
        if self.count == 1 == len(self._first) and not self.skip:
            return self._first[0]
        what = "are left out" if self.skip else "can't be used"
        lines = [f"{self.count} of {total} samples of {self.title} {what}:", *(f"  {text}" for text in self._first)]
        if self.count > len(self._first):
            lines.append(f"  ... and {self.count - len(self._first)} more")
        return "\n".join(lines)


SHOWN_PROBLEMS = 20
FAIL_ADVICE = (
    "Mend or remove them (`flash-diffusion data check` lists everything), or leave them out with data.on_error: skip"
)
