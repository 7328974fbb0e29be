"""What the pages of all reports share: numbers as people read them, embedded pictures, the training's curves.

A page is one file and fetches nothing: pictures are embedded, charts (``charts.py``) are inline SVG, and colours follow
the reader's light or dark setting. Style and frame are in ``report_base.html``.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .charts import curve_chart

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.table import Table

TEMPLATES = Path(__file__).parent
PICTURE_SIZE = 256  # px; larger pictures are reduced for the page
PICTURE_QUALITY = 90  # of WebP
NO_CURVE = {"update", "phase", "progress", "lr", "images_per_second", "seconds"}  # a log's numbers that are no losses


@dataclass(frozen=True)
class Group:
    """Runs that belong together in a table or a grid.

    Attributes:
        kind: their colour.
        lines: whether charts draw them.
    """

    title: str
    kind: str
    runs: tuple[dict[str, Any], ...]
    lines: bool = True


def terminal_table(title: str) -> Table:
    """An empty table for the terminal: narrow, since 80 columns would break every cell over lines."""
    from rich.table import Table

    return Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)


def render(template: str, **context: Any) -> str:
    """A page from a template beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(TEMPLATES),
    )
    environment.filters.update(number=number, plain="{:g}".format, share=share, seconds=seconds, listed=listed)
    return environment.get_template(template).render(**context)


def data_uri(path: Path) -> str:
    """A picture file as it stands in the page."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
        stream = io.BytesIO()
        picture.convert("RGB").save(stream, "WEBP", quality=PICTURE_QUALITY, method=6)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def number(value: float | None, digits: int = 3) -> str:
    """``0.0123``, ``1.23``, ``12.3``, ``1230``: so many significant digits, a dash for no value."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{min(decimals, 6)}f}"


def listed(values: Sequence[object]) -> str:
    """``4, 2 or 1``."""
    *rest, last = [str(value) for value in values]
    return f"{', '.join(rest)} or {last}" if rest else last


def share(value: float | None) -> str:
    """``0.987`` as ``99 %``."""
    return "–" if value is None else f"{100 * value:.0f} %"


def seconds(value: float) -> str:
    """``1.23 s`` or ``12.3 ms``."""
    return f"{number(value)} s" if value >= 0.1 else f"{number(1000 * value)} ms"


@dataclass(frozen=True)
class Column:
    """A run's pictures in a grid: what stands above them, and their files."""

    title: str
    notes: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, run: Mapping[str, Any], files: Sequence[str]) -> Column:
        """A run's, from its line in the report."""
        passes = f"{run['nfe']} pass{'es' * (run['nfe'] > 1)}"
        cost = [] if run["seconds_per_image"] is None else [seconds(run["seconds_per_image"])]
        return cls(f"{run['steps']} step{'s' * (run['steps'] > 1)}", (passes, *cost), tuple(files))


@dataclass(frozen=True)
class Columns:
    """Runs that stand together; ``kind`` is their colour."""

    title: str
    kind: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Grid:
    """Pictures: a row a prompt, a column a run; the files lie in ``folder``."""

    groups: tuple[Columns, ...]
    prompts: tuple[str, ...]
    folder: Path

    def picture(self, column: Column, row: int) -> str:
        """One picture, as it stands in the page."""
        return data_uri(self.folder / column.files[row])


@dataclass(frozen=True)
class Chart:
    """A figure of the page: its title, what it says, and the SVG."""

    title: str
    caption: str
    svg: Markup


def read_log(path: Path) -> list[dict[str, Any]]:
    """The updates in a training's log, one JSON object a line.

    A last line that a killed process left unfinished is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    entries = []
    for index, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if index + 1 < len(lines):
                raise UserError(f"{path}, line {index + 1} is not JSON: {error}; expected one object a line") from error
    return [entry for entry in entries if "update" in entry]


def training_charts(entries: Sequence[dict[str, Any]]) -> list[Chart]:
    """One chart for each loss in the log, the total first."""

    def finite(entry: dict[str, Any], name: str) -> bool:
        value = entry.get(name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    names = dict.fromkeys(name for entry in entries for name in entry if name not in NO_CURVE and finite(entry, name))
    phases = [(entry["update"], entry.get("phase", 0)) for entry in entries]
    charts = []
    for name in sorted(names, key=lambda name: name != "total"):
        points = [(float(entry["update"]), float(entry[name])) for entry in entries if finite(entry, name)]
        if len(points) > 1 and any(value for _, value in points):  # a term with weight 0 is always 0
            title = name.replace("_", " ")
            charts.append(Chart(title, "", curve_chart(title, points, phases)))
    return charts
