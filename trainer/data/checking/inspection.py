"""Read a whole data set as training would, and find everything that is wrong with it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image

from ...config import DataSection
from ...errors import UserError
from ..encoding.buckets import bucket_sizes, nearest_bucket
from ..encoding.lookahead import in_order
from ..framing import framed
from ..reading import decode, open_source
from ..reading.names import HEIF, HEIF_ADVICE
from ..reading.samples import COMPANIONS, BadSample, RawSample, Source
from .findings import Findings, printable

ENLARGED = 1.5  # scaled up by more than this, a picture is soft
KEPT = 0.4  # share of a picture inside its frame, below which it is mentioned; a square of a picture of 2.5 : 1
GRAIN = 8  # of the buckets' sides, in pixels: models take multiples of 8 or more
SHARED = 3  # pictures, from which a shared caption is mentioned, where it is also a
SHARED_SHARE = 0.05  # of all pictures
FEW = 20  # samples
THUMBNAIL = 192  # pixels
SHOWN_REMARKS = 12  # samples on the sheet, of each kind of finding
AHEAD = 32  # samples that are decoded side by side or wait


@dataclass(frozen=True)
class Shown:
    """A sample of the contact sheet, as training sees it.

    Attributes:
        remarks: kinds of findings about it.
        picture: cut to the resolution; None where it can't be read.
        beside: companions, cut in the same way.
    """

    name: str
    caption: str
    size: tuple[int, int]
    remarks: tuple[str, ...] = ()
    picture: Image.Image | None = None
    beside: dict[str, Image.Image] = field(default_factory=dict)


@dataclass
class _Look:
    """What was found in one sample, before it is compared with others."""

    raw: RawSample | BadSample
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind, message
    size: tuple[int, int] = (0, 0)
    content: bytes = b""
    present: tuple[str, ...] = ()
    shown: Shown | None = None


class Inspection:
    """Look at every sample once.

    Args:
        resolution: side in pixels of the square that training cuts, or of the square among the buckets.
        task_companions: companions that the task reads; None without a task: all are looked at.
        longer: returns for each caption True if it is too long.
        sheet: samples on the contact sheet: those with findings first, then others, chosen at random.
    """

    def __init__(
        self,
        data: DataSection,
        resolution: int,
        task_companions: Sequence[str] | None,
        longer: Callable[[Sequence[str]], list[bool]],
        sheet: int = 0,
    ) -> None:
        self.data = data
        self.resolution = resolution
        self._frames = bucket_sizes(resolution, GRAIN) if data.buckets else [(resolution, resolution)]
        self.companions = COMPANIONS if task_companions is None else tuple(task_companions)
        self._companion_kind = "companion of a task" if task_companions is None else "companion"
        self._longer = longer
        self._sheet = sheet
        self._random = random.Random(0)
        self._captions: Counter[str] = Counter()
        self._same: dict[bytes, str] = {}
        self._copies: defaultdict[str, list[str]] = defaultdict(list)
        self._present: Counter[str] = Counter()
        self._lacking: defaultdict[str, list[str]] = defaultdict(list)
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._remarked: list[Shown] = []
        self._remarks: Counter[str] = Counter()  # kind of finding -> samples on the sheet
        self._others: list[tuple[int, Shown]] = []

    def run(self, progress: Callable[[int], object] = lambda done: None) -> Findings:
        """Return everything that was found.

        Args:
            progress: called with the number of samples so far.

        Raises:
            UserError: there is no data.
        """
        source = open_source(self.data, self.companions, strict=False)
        findings = Findings(source.title)
        raws = islice(self._raw_samples(source, findings), self.data.limit)
        with ThreadPoolExecutor() as pool:
            for number, (_, look) in enumerate(in_order(pool, AHEAD, self._look, raws)):
                self._add(look, number, findings)
                progress(number + 1)
        self._compare(findings, source)
        return findings

    def shown(self) -> list[Shown]:
        """Return the samples of the contact sheet."""
        rest = max(0, self._sheet - len(self._remarked))
        return self._remarked[: self._sheet] + [shown for _, shown in sorted(self._others[:rest], key=itemgetter(0))]

    def _raw_samples(self, source: Source, findings: Findings) -> Iterator[RawSample | BadSample]:
        for unit in range(len(source)):
            try:
                yield from source.read(unit)
            except UserError as error:
                findings.add("shard", str(error))

    def _look(self, raw: RawSample | BadSample) -> _Look:
        """Decode a sample and its companions. Runs in a thread."""
        look = _Look(raw)
        if isinstance(raw, BadSample):
            kind = self._companion_kind if raw.kind == "companion" else raw.kind
            look.problems.append((kind, str(raw)))
            return look
        if raw.picture is None:
            return look
        try:
            image = decode(RawSample(raw.name, raw.picture, raw.captions)).image
        except BadSample as problem:
            look.problems.append(("picture", str(problem)))
            return look
        look.size = image.size
        look.content = blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
        look.present = tuple(raw.companions)
        beside = {}
        for name, content in raw.companions.items():
            try:
                sample = decode(RawSample(raw.name, image, raw.captions, {name: content}))
                beside[name] = sample.companions[name]
            except BadSample as problem:
                look.problems.append((self._companion_kind, str(problem)))
        look.problems += self._size_problems(raw.name, image.size)
        if self._sheet:
            thumbnails = {name: self._thumbnail(picture, image.size) for name, picture in beside.items()}
            look.shown = Shown(
                raw.name, " | ".join(raw.captions), image.size, (), self._thumbnail(image, image.size), thumbnails
            )
        return look

    def _size_problems(self, name: str, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
        width, height = size
        frame_height, frame_width = self._frame(size)
        scale = max(frame_height / height, frame_width / width)
        kept = frame_height * frame_width / (scale * scale * height * width)
        if scale > ENLARGED:
            yield "enlarged", f"{name}: {width} x {height}, enlarged {scale:.1f} times"
        if kept < KEPT:
            yield "aspect", f"{name}: {width} x {height}, {kept:.0%} of it are kept"

    def _frame(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the frame that training cuts from a picture of ``size`` = (width, height)."""
        if len(self._frames) == 1:
            return self._frames[0]
        return self._frames[int(nearest_bucket(np.array([size], np.int32), self._frames)[0])]

    def _thumbnail(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Return a picture or companion, cut to the frame of a picture of ``size``."""
        cut = framed(picture, self._frame(size))
        cut.thumbnail((THUMBNAIL, THUMBNAIL))
        return cut

    def _add(self, look: _Look, number: int, findings: Findings) -> None:
        """Compare a sample with the samples before it. Runs in the main thread, in the order of the data."""
        raw = look.raw
        problems = list(look.problems)
        if isinstance(raw, RawSample) and not any(kind == "picture" for kind, _ in problems):
            findings.samples += 1
            problems += self._caption_problems(raw)
            if raw.picture is not None:
                self._sizes[look.size] += 1
                problems += self._copy_problems(raw, look)
                for name in self.companions:
                    if name in look.present:
                        self._present[name] += 1
                    elif len(self._lacking[name]) < 3:
                        self._lacking[name].append(raw.name)
        for kind, message in problems:
            findings.add(kind, message.replace(f"{findings.title}/", ""))
        if self._sheet:
            self._show(look, number, tuple(dict.fromkeys(kind for kind, _ in problems)), findings.title)

    def _caption_problems(self, raw: RawSample) -> Iterator[tuple[str, str]]:
        for caption, longer in zip(raw.captions, self._longer(raw.captions), strict=True):
            self._captions[caption] += 1
            if not caption:
                yield "empty caption", raw.name
            if longer:
                yield "long caption", f"{raw.name}: {caption[:80]}..."

    def _copy_problems(self, raw: RawSample, look: _Look) -> Iterator[tuple[str, str]]:
        first = self._same.setdefault(look.content, raw.name)
        if first != raw.name:
            yield "duplicate", f"{raw.name} = {first}"

    def _show(self, look: _Look, number: int, remarks: tuple[str, ...], title: str) -> None:
        shown = look.shown or Shown(look.raw.name, " | ".join(getattr(look.raw, "captions", ())), (0, 0))
        name = printable(shown.name.replace(f"{title}/", ""))
        shown = replace(shown, name=name, caption=printable(shown.caption), remarks=remarks)
        if any(self._remarks[remark] < SHOWN_REMARKS for remark in remarks):
            self._remarks.update(remarks)
            self._remarked.append(shown)
        elif len(self._others) < self._sheet:
            self._others.append((number, shown))
        elif (place := self._random.randrange(number + 1)) < self._sheet:  # every sample has the same chance
            self._others[place] = (number, shown)

    def _compare(self, findings: Findings, source: Source) -> None:
        """Add what only the whole set tells."""
        for name in self.companions:
            if 0 < self._present[name] < findings.samples:
                lacking = ", ".join(self._lacking[name]).replace(f"{findings.title}/", "")
                having = f"{self._present[name]} of {findings.samples} pictures have a {name}"
                findings.add(self._companion_kind, f"{having}; the first without: {lacking}")
        for caption, count in self._captions.most_common():
            if count < max(SHARED, SHARED_SHARE * findings.samples):
                break
            if caption and count > 1 and self.data.source != "demo":
                findings.add("same caption", f"{count} times: {caption[:80]}")
        left_out = source.left_out
        if left_out.captions:
            findings.add("lonely caption", f"such as {left_out.example}", left_out.captions)
        if left_out.empty:
            findings.add("empty prompt", source.title, left_out.empty)
        for suffix, count in left_out.suffixes.most_common():
            advice = f" ({HEIF_ADVICE})" if suffix.lstrip(".") in HEIF else ""
            findings.add("not read", f"{count} {suffix}{advice}", count)
        if findings.samples < FEW:
            findings.add("few", f"{findings.samples} samples")
        findings.facts = self._facts()

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"distinct captions": len(self._captions)}
        if self._sizes:
            sides = [min(size) for size, count in self._sizes.items() for _ in range(count)]
            facts |= {
                "distinct pictures": len(self._same),
                "resolution": self.resolution,
                "smallest picture": "{} x {}".format(*min(self._sizes, key=lambda size: size[0] * size[1])),
                "largest picture": "{} x {}".format(*max(self._sizes, key=lambda size: size[0] * size[1])),
                "smaller than the resolution": sum(side < self.resolution for side in sides),
            }
        return facts | {f"pictures with {name}": count for name, count in self._present.items()}
