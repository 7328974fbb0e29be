"""The blocks that a report's page is made of: targets, tables, grids of pictures, charts, facts, settings.

A page says what is shown; ``report.html`` says how each block looks, and :mod:`.build` prints targets, notes and the
tables with a ``terminal`` title in the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UserError
from ..pictures import data_uri
from .charts import Chart, Line, passes_chart
from .numbers import counted, number, seconds

PICTURE_SIZE = 256  # px; larger pictures are reduced for the page
PICTURE_QUALITY = 90  # of WebP

SOLVERS = {
    "dpmpp_2m": "DPM-Solver++(2M)",
    "dpmpp_3m": "DPM-Solver++(3M)",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "euler": "Euler’s method",
}

Run = Mapping[str, Any]  # one of the ``runs`` of report.json


@dataclass(frozen=True)
class Group:
    """Runs that stand together in a table, a grid or a chart.

    Attributes:
        kind: the colour: ``aim``, ``student``, ``plain`` or ``guided``.
        lines: whether charts draw the runs.
    """

    title: str
    kind: str
    runs: tuple[Run, ...]
    lines: bool = True


@dataclass(frozen=True)
class Target:
    """A target of the student with the value that came out.

    Attributes:
        value: ``1.20 ×``, ``52 %`` or ``+0.3``.
        measure: the words after the value, such as "times the floor".
        limit: the limit, as text.
    """

    run: str
    value: str
    measure: str
    limit: str
    met: bool

    @property
    def line(self) -> str:
        """The target in one line, for the terminal."""
        value = self.value.removesuffix(" ×")  # the measure says "times"
        return f"{'met' if self.met else 'missed'}: {self.run}, {value} {self.measure} (target: {self.limit})"


@dataclass(frozen=True)
class Targets:
    """All targets, one card each."""

    block: ClassVar[str] = "targets"
    cards: tuple[Target, ...]


@dataclass(frozen=True)
class Finding:
    """A sentence on what the figures say; ``good`` is whether it speaks for the student."""

    text: str
    good: bool


@dataclass(frozen=True)
class Findings:
    """Sentences on what the figures say, in the terminal too."""

    block: ClassVar[str] = "findings"
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, a small second line, and ``better`` or ``worse`` as its colour."""

    text: str
    below: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class TableColumn:
    """A column of a table.

    Attributes:
        title: lines of the head, in the page.
        short: head in the terminal; None = not in the terminal.
        cell: a run's cell.
        better: ``high`` or ``low``, an arrow in the page's head; empty = no arrow.
    """

    title: str
    short: str | None
    cell: Callable[[Run], Cell | str]
    better: str = ""

    def of(self, run: Run) -> Cell:
        """Return a run's cell."""
        cell = self.cell(run)
        return Cell(cell) if isinstance(cell, str) else cell


@dataclass(frozen=True)
class RunTable:
    """One line per run.

    Attributes:
        terminal: title in the terminal; None = the table stands only in the page.
    """

    block: ClassVar[str] = "table"
    columns: tuple[TableColumn, ...]
    groups: tuple[Group, ...]
    terminal: str | None = None


@dataclass(frozen=True)
class PictureColumn:
    """A run's pictures in a grid: the head, small lines under the head, and the files."""

    title: str
    notes: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, run: Run, files: Sequence[str]) -> PictureColumn:
        """Return the column of a run."""
        cost = [] if run["seconds_per_image"] is None else [seconds(run["seconds_per_image"])]
        return cls(counted(run["steps"], "step"), (counted(run["nfe"], "pass"), *cost), tuple(files))


@dataclass(frozen=True)
class PictureGroup:
    """Columns of a grid that stand together."""

    title: str
    kind: str
    columns: tuple[PictureColumn, ...]


@dataclass(frozen=True)
class PictureGrid:
    """Pictures: one row per prompt, one column per run; the files are in ``folder``.

    Attributes:
        small: draw small pictures, for a grid of many columns.
    """

    block: ClassVar[str] = "grid"
    groups: tuple[PictureGroup, ...]
    prompts: tuple[str, ...]
    folder: Path
    small: bool = False

    def picture(self, column: PictureColumn, row: int) -> str:
        """Return a picture as a ``data:`` URI.

        Raises:
            UserError: the picture's file is missing or damaged.
        """
        path = self.folder / column.files[row]
        try:
            return data_uri(path, PICTURE_SIZE, PICTURE_QUALITY)
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a damaged header
            raise UserError(
                f"{path}, a picture of the report, can't be read ({error}); restore the file, or evaluate again"
            ) from error


@dataclass(frozen=True)
class Charts:
    """Charts side by side, with a legend of groups above."""

    block: ClassVar[str] = "charts"
    charts: tuple[Chart, ...]
    legend: tuple[Group, ...] = ()
    small: bool = False


@dataclass(frozen=True)
class Facts:
    """Terms and their explanations."""

    block: ClassVar[str] = "facts"
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Settings:
    """Everything that the figures depend on, as JSON behind a fold."""

    block: ClassVar[str] = "settings"
    content: Mapping[str, Any]


Block = Targets | Findings | RunTable | PictureGrid | Charts | Facts | Settings


@dataclass(frozen=True)
class Section:
    """A titled part of the page, with a sentence under the title."""

    title: str
    blocks: tuple[Block, ...]
    intro: str = ""


@dataclass(frozen=True)
class Page:
    """A report's page.

    Attributes:
        over: small line above the title.
        name: in the browser's tab.
        lead: sentences under the title.
        notes: sentences that a reader must know.
        method: the last section; the training's curves stand before it.
        curves: of the training's log.
        health: what the log said of the training's health, above the curves.
    """

    over: str
    name: str
    title: str
    lead: str
    notes: tuple[str, ...]
    sections: tuple[Section, ...]
    method: Section
    curves: tuple[Chart, ...] = field(default=())
    health: tuple[Finding, ...] = field(default=())

    @property
    def all_sections(self) -> tuple[Section, ...]:
        """The sections in their order, with the training's curves."""
        health = (Findings(self.health),) if self.health else ()
        training = (Section("Training", (*health, Charts(self.curves, small=True))),) if self.curves else ()
        return (*self.sections, *training, self.method)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the sections, without the training's curves and the method."""
        return tuple(block for section in self.sections for block in section.blocks)


def target_section(cards: Sequence[Target]) -> tuple[Section, ...]:
    """Return the section of the targets; empty where there are no targets."""
    met = sum(card.met for card in cards)
    return (Section(f"{met} of {len(cards)} targets met", (Targets(tuple(cards)),)),) if cards else ()


def sampling_words(sampling: Mapping[str, Any]) -> str:
    """Return how teacher and student were sampled, from the ``sampling`` of a report."""
    solver = SOLVERS.get(sampling["solver"], sampling["solver"])
    told = ", ".join(f"{share:g} in {steps} steps" for steps, share in sampling["stochasticity"].items())
    noise = f" Its stochasticity is {told} (1 = fresh noise at every step, 0 = none)." if told else ""
    return f"The teacher solves its ODE with {solver}. The student uses the few-step sampler.{noise}"


def chart_of(
    groups: Sequence[Group],
    value: Callable[[Run], float | None],
    title: str,
    caption: str,
    *,
    level: float | None = None,
    level_name: str = "",
    log: bool = True,
    short: str = "",
) -> Chart:
    """Return a chart of a value over network passes, one line per group.

    Args:
        value: a run's value; None leaves the run out.
        level: a dashed level to compare with, called ``level_name``.
        log: whether the values' axis is logarithmic.
        short: the value's name in tooltips; default ``title``.
    """
    lines = []
    for group in groups:
        found = [(run, value(run)) for run in sorted(group.runs, key=lambda run: run["nfe"]) if group.lines]
        points = [(run, y) for run, y in found if y is not None]
        if points:
            tips = tuple(
                f"{run['name']}: {counted(run['nfe'], 'pass')}, {short or title} {number(y)}" for run, y in points
            )
            lines.append(Line(group.kind, tuple((run["nfe"], y) for run, y in points), tips))
    return Chart(title, caption, passes_chart(title, lines, level, level_name, log))
