"""Remember how many usable samples each shard has, so that a resumed run skips the shards that it has read."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..reading.samples import Source
from ..reading.shards import Shards

logger = logging.getLogger(__name__)


class SampleCounts(Mapping[int, int]):
    """Shard -> usable samples, of the shards that were read to their end, by any process.

    Each process adds lines to a file of its own. A shard of this machine that has changed since counts as unknown.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder = folder
        self.source = source
        self._known: dict[int, int] = {}
        self._file: Path | None = None
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                self._load(line)

    def _load(self, line: str) -> None:
        try:
            found = json.loads(line)
            shard, count, stamp = int(found["shard"]), int(found["samples"]), found["stamp"]
        except (ValueError, KeyError, TypeError):
            return  # the last line of a killed process: the shard is read again
        if 0 <= shard < len(self.source) and stamp == local_stamp(self.source, shard):
            self._known[shard] = count

    def __getitem__(self, shard: int) -> int:
        return self._known[shard]

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def put(self, shard: int, count: int) -> None:
        """Keep the count of a shard that was read to its end."""
        known = self._known.get(shard)
        if known == count:
            return
        if known is not None:
            logger.warning(
                "shard %d of %s had %d usable samples and has %d now: the order after a resume is another one",
                shard, self.source.title, known, count,
            )  # fmt: skip
        self._known[shard] = count
        line = json.dumps({"shard": shard, "samples": count, "stamp": local_stamp(self.source, shard)})
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = self.folder / f"{uuid.uuid4().hex}.jsonl"
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.warning("%s can't be written (%s): a resumed run reads more shards again", self.folder, error)


def local_stamp(source: Source, shard: int) -> str | None:
    """Return the stamp of a shard of this machine, None for a remote one: asking for thousands would take minutes."""
    remote = isinstance(source, Shards) and isinstance(source.paths[shard], str)
    return None if remote else source.stamp(shard)
