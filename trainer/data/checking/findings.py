"""What a check of a data set found: a count, the first names and what to do, for each kind of finding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SHOWN = 20  # names of each finding
FORMAT = 1  # of the JSON output, raised when fields change

Severity = Literal["error", "warning"]


def printable(text: str) -> str:
    """Return a name or caption for a terminal and a page, with blanks for control characters and broken letters."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


@dataclass
class Finding:
    """One kind of thing that is wrong.

    Attributes:
        kind: stable name, for scripts.
        severity: error: training stops or leaves the samples out; warning: training goes on.
        title: what is wrong, in a few words.
        advice: what to do.
        count: number of cases.
        cases: the first cases, one line each.
    """

    kind: str
    severity: Severity
    title: str
    advice: str
    count: int = 0
    cases: list[str] = field(default_factory=list)

    def add(self, case: str, count: int = 1) -> None:
        """Add a case."""
        self.count += count
        if len(self.cases) < SHOWN:
            self.cases.append(printable(case))


# Kind -> severity, title, advice; in the order of the output.
KINDS: Mapping[str, tuple[Severity, str, str]] = {
    "shard": ("error", "shards that can't be read", "write or download them again"),
    "picture": ("error", "pictures that can't be read", "replace or remove them"),
    "caption": ("error", "captions that are missing or can't be read", "write them; an empty .txt file is fine"),
    "companion": ("error", "masks, identities and hints that don't fit", "mend them, or remove all of the kind"),
    "companion of a task": ("warning", "companions that a task would refuse", "mend them before you train that task"),
    "enlarged": ("warning", "pictures much smaller than the resolution", "use larger ones, or lower data.resolution"),
    "aspect": ("warning", "pictures of which little is kept", "crop them by hand, or set data.buckets: true"),
    "duplicate": ("warning", "pictures that are there several times", "remove them; training sees them more often"),
    "empty caption": ("warning", "empty captions", "write them; the model learns the empty prompt from these pictures"),
    "long caption": ("warning", "captions longer than the text encoder reads", "shorten them; the rest has no effect"),
    "same caption": ("warning", "captions that many pictures share", "describe what tells the pictures apart"),
    "lonely caption": ("warning", "caption files without a picture", "remove them, or add their pictures"),
    "empty prompt": ("warning", "empty prompts", "remove them; training leaves them out"),
    "not read": ("warning", "files that are not read", "convert them to .png or .jpg if they are pictures"),
    "few": ("warning", "few samples", "add samples; a few hundred are enough to try"),
}


@dataclass
class Findings:
    """All findings about a data set.

    Attributes:
        title: path or name of the data.
        samples: number of samples that can be used.
        notes: further sentences.
        facts: name -> figure.
        found: kind -> finding.
    """

    title: str
    samples: int = 0
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Finding] = field(default_factory=dict)

    def add(self, kind: str, case: str, count: int = 1) -> None:
        """Add a case of a kind."""
        if kind not in self.found:
            self.found[kind] = Finding(kind, *KINDS[kind])
        self.found[kind].add(case, count)

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of a severity, in the order of ``KINDS``."""
        return [self.found[kind] for kind in KINDS if kind in self.found and self.found[kind].severity == severity]

    @property
    def exit_code(self) -> int:
        """0: nothing is wrong; 1: warnings; 2: errors."""
        return 2 if self.of("error") else 1 if self.of("warning") else 0

    def as_json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        return {
            "format": FORMAT,
            "data": self.title,
            "samples": self.samples,
            "facts": self.facts,
            "findings": [asdict(finding) for severity in ("error", "warning") for finding in self.of(severity)],
            "notes": self.notes,
            "exit_code": self.exit_code,
        }
