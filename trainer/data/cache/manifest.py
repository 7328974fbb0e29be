"""What a source holds, sample by sample: hashes of contents, sizes and captions; read once, kept in the cache.

A unit of a source (512 files, or a shard) has one manifest, under a hash of its files' names, sizes and times. While
these stay, a run knows every sample without opening the files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...files import write_whole
from ...interrupts import StopRequest
from ...progress import Progress
from ..reading import picture_size
from ..reading.samples import BadSample, RawSample, Source
from .store import KEY_BYTES, Keys, as_keys, key_of

logger = logging.getLogger(__name__)

VERSION = 2  # of the manifest, raised when samples are read in another way
NO_PICTURE = b"\0" * KEY_BYTES  # content of a prompt without a picture


@dataclass(frozen=True)
class Manifest:
    """The n samples of one unit.

    Attributes:
        content: (n, 16) hash of each picture's bytes.
        sizes: (n, 2) width and height in pixels, upright; 0, 0 without a picture.
        beside: companion -> (n, 16) hash of its bytes.
        captions: n lists of captions.
        problems: name and message of each sample that can't be used; these samples are not counted in n.
    """

    content: Keys
    sizes: NDArray[np.int32]
    beside: dict[str, Keys] = field(default_factory=dict)
    captions: list[list[str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.content)


def content_key(picture: bytes | Image.Image | None) -> bytes:
    """Return a hash of a picture file's bytes, or of the pixels of a picture in memory."""
    if picture is None:
        return NO_PICTURE
    if isinstance(picture, Image.Image):
        return key_of(picture.mode, f"{picture.width}x{picture.height}", picture.tobytes())
    return key_of(picture)


def scan_unit(source: Source, unit: int, companions: Sequence[str]) -> Manifest:
    """Read a unit's files, and return its manifest."""
    content: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    beside: dict[str, list[bytes]] = {name: [] for name in companions}
    captions: list[list[str]] = []
    problems: list[tuple[str, str]] = []
    for sample in source.read(unit):
        try:
            if isinstance(sample, BadSample):
                raise sample
            size = (0, 0) if sample.picture is None else picture_size(sample)
        except BadSample as problem:
            problems.append((problem.name, str(problem)))
            continue
        content.append(content_key(sample.picture))
        sizes.append(size)
        for name, keys in beside.items():
            keys.append(content_key(sample.companions.get(name)))
        captions.append(list(sample.captions))
    return Manifest(
        as_keys(content),
        np.asarray(sizes, np.int32).reshape(-1, 2),
        {name: as_keys(keys) for name, keys in beside.items()},
        captions,
        problems,
    )


def usable(source: Source, unit: int) -> Iterator[RawSample]:
    """Yield the samples of a unit that its manifest counts, in its order."""
    for sample in source.read(unit):
        if isinstance(sample, BadSample):
            continue
        if sample.picture is not None:
            try:
                picture_size(sample)
            except BadSample:
                continue
        yield sample


class Manifests:
    """The manifests of a source, in a folder of the cache.

    Args:
        folder: of all manifests.
        source: is read where a manifest is missing.
        reading: what else decides how samples are read: prefix of captions, companions, ...
    """

    def __init__(self, folder: Path, source: Source, companions: Sequence[str], reading: str) -> None:
        self.folder = folder
        self.source = source
        self.companions = tuple(companions)
        self.reading = reading

    def path(self, unit: int) -> Path | None:
        """Return the path of a unit's manifest; None for a unit without a stamp, which is read each time."""
        stamp = self.source.stamp(unit)
        if stamp is None:
            return None
        name = key_of(VERSION, self.reading, ",".join(self.companions), stamp).hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def prepare(self, units: Sequence[int], stop: StopRequest) -> None:
        """Write the manifests that are missing, until all are there or ``stop`` is asked.

        Args:
            units: this process's share.
        """
        missing = [unit for unit in units if (path := self.path(unit)) is not None and not path.is_file()]
        progress = Progress(f"reading {self.source.title}", "units", len(missing))
        for unit in missing:
            if stop.asked:
                return
            self._scan(unit, self.path(unit))
            progress.advance(1)

    def load(self, unit: int) -> Manifest:
        """Return a unit's manifest; it is made anew where it is missing or damaged."""
        path = self.path(unit)
        manifest = None if path is None else _read(path)
        return self._scan(unit, path) if manifest is None else manifest

    def forget(self, unit: int) -> None:
        """Remove a unit's manifest, so that the unit is read again."""
        path = self.path(unit)
        if path is not None:
            path.unlink(missing_ok=True)

    def _scan(self, unit: int, path: Path | None) -> Manifest:
        manifest = scan_unit(self.source, unit, self.companions)
        if path is not None:
            _write(path, manifest)
        return manifest


def _write(path: Path, manifest: Manifest) -> None:
    text = json.dumps([manifest.captions, manifest.problems]).encode()
    tensors = {
        "content": torch.from_numpy(manifest.content),
        "sizes": torch.from_numpy(manifest.sizes),
        "text": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        **{f"beside.{name}": torch.from_numpy(keys) for name, keys in manifest.beside.items()},
    }
    write_whole(path, lambda partial: save_file(tensors, partial, metadata={"check": _check(tensors)}), shared=True)


def _check(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, dtypes, shapes and contents."""
    parts: list[bytes | str] = []
    for name, value in sorted(tensors.items()):
        parts += [name, repr((value.dtype, tuple(value.shape))), value.numpy().tobytes()]
    return key_of(*parts).hex()


def _read(path: Path) -> Manifest | None:
    """Return a manifest, or None where the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            check = (file.metadata() or {}).get("check")
            # Copies: a view would keep the file mapped, and a system maps 65,530 files at most.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if check != _check(tensors):
            raise SafetensorError("its content is not what was written")
        captions, problems = json.loads(tensors["text"].numpy().tobytes())
        beside = {
            name.removeprefix("beside."): value.numpy() for name, value in tensors.items() if name.startswith("beside.")
        }
        return Manifest(
            tensors["content"].numpy(),
            tensors["sizes"].numpy(),
            beside,
            captions,
            [(name, message) for name, message in problems],
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s of the cache is damaged (%s): its samples are read again", path, error)
        return None
