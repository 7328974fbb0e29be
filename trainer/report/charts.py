"""Draw small charts as inline SVG. Colours and fonts come from the page, by class, so they follow light and dark."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..health.figures import caption_of

if TYPE_CHECKING:
    from markupsafe import Markup

# A log's numbers that are no losses.
NO_CURVE = {"update", "phase", "progress", "lr", "images_per_second", "seconds"}

LEFT, RIGHT, TOP, BOTTOM = 50, 18, 18, 44  # px around the plot, for its labels
CURVE_POINTS = 240  # drawn of a training curve; more would not be seen
SMOOTHING = 0.02  # of a run's length: how far a curve's average reaches back
LOG_SCALE_FROM = 20.0  # times between the least and the largest value of a curve
WIDE_DECADES = 2.5  # decades from which a logarithmic axis is marked at powers of ten alone


@dataclass(frozen=True)
class Chart:
    """A chart of the page: title, a sentence under the title, and the SVG."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Frame:
    """The size of a drawing, in px at a text size of 13."""

    width: int
    height: int

    @property
    def right(self) -> int:
        """The right end of the plot."""
        return self.width - RIGHT

    @property
    def bottom(self) -> int:
        """The bottom of the plot."""
        return self.height - BOTTOM


LARGE, SMALL = Frame(520, 310), Frame(380, 230)


@dataclass(frozen=True)
class Line:
    """Points (x, y) with a tooltip each; ``kind`` is the class of their colour."""

    kind: str
    points: tuple[tuple[float, float], ...]
    tips: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """Map values ``low..high`` to pixels ``start..end``: linear, or logarithmic with ``log``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value, in px."""
        low, high, value = (math.log(number) if self.log else number for number in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return a few round values: 1, 2 and 5 times powers of ten; only the powers where the axis is long."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1,) if math.log10(self.high / self.low) > WIDE_DECADES else (1, 2, 5)
            values = [factor * 10.0**decade for decade in decades for factor in factors]
        else:
            rough = (self.high - self.low) / 5 or 1.0
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
            values = [index * step for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        tolerance = 1e-9 * abs(self.high)
        return [value for value in values if self.low - tolerance <= value <= self.high + tolerance]


def passes_chart(name: str, lines: Sequence[Line], level: float | None, level_name: str, log: bool = True) -> Markup:
    """Draw values over the number of network passes, and a dashed level to compare with.

    Args:
        log: whether the values' axis is logarithmic; the axis of the passes always is.
    """
    frame = LARGE
    values = [y for line in lines for _, y in line.points if y > 0 or not log] + ([level] if level else [])
    passes = sorted({x for line in lines for x, _ in line.points})
    across = Axis(min(passes), max(passes), LEFT + 20, frame.right - 20, log=True)
    low, high = min(values, default=1.0), max(values, default=1.0)
    margin = (high - low) / 4 or abs(high) / 10
    up = Axis(*((low / 1.5, high * 1.25) if log else (low - margin, high + margin)), frame.bottom, TOP, log)
    parts = [*_rules(frame, up), *_marks(frame, across, passes, "network passes per picture")]
    if level:
        parts.append(f'<path class="level" d="M{LEFT} {up(level):.1f}H{frame.right}"/>')
    for line in lines:
        points = [(across(x), up(max(y, up.low))) for x, y in line.points]
        parts.append(f'<path class="line {line.kind}" d="{_path(points)}"/>')
        for (x, y), tip in zip(points, line.tips, strict=True):
            title = f"<title>{escape(tip)}</title>"
            parts.append(f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>')
    if level:
        parts.append(_text(LEFT + 4, up(level) + 16, level_name, "start", "level-name"))
    return _svg(frame, f"{name} against the number of network passes", parts)


def curve_chart(name: str, points: Sequence[tuple[float, float]], phases: Sequence[tuple[float, Any]]) -> Markup:
    """Draw a training curve over updates: values faint, their running mean strong, a line where a phase begins.

    Args:
        points: (update, value), in order, finite.
        phases: (update, phase), in order.
    """
    frame = SMALL
    smooth = list(zip([x for x, _ in points], running_mean([y for _, y in points]), strict=True))
    low, high = min(y for _, y in points), max(y for _, y in points)
    log = low > 0 and high / low > LOG_SCALE_FROM
    across = Axis(points[0][0], points[-1][0], LEFT, frame.right)
    up = Axis(low if log else min(low, 0.0), max(high, 0.0), frame.bottom, TOP, log)
    parts = [*_rules(frame, up), *_marks(frame, across, across.ticks(), "updates")]
    for kind, values in (("raw", points), ("student", smooth)):
        parts.append(f'<path class="line {kind}" d="{_path([(across(x), up(y)) for x, y in thinned(values)])}"/>')
    for (_, before), (update, phase) in itertools.pairwise(phases):
        if phase != before and across.low <= update <= across.high:
            parts.append(f'<path class="phase" d="M{across(update):.1f} {TOP}V{frame.bottom}"/>')
            parts.append(_text(across(update) + 5, frame.bottom - 7, str(phase), "start", "phase-name"))
    return _svg(frame, f"{name} over the training", parts)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the updates of a training's log, one JSON object a line; an unfinished last line is skipped.

    Raises:
        UserError: another line is not JSON, or the file is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path} can't be read as the log of a training ({error}); name another file with --log"
        ) from error
    entries = []
    for index, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if index + 1 < len(lines):
                raise UserError(
                    f"{path}, line {index + 1} is not JSON: {error}; expected one object a line, so remove "
                    "this line, or name another file with --log"
                ) from error
    return [entry for entry in entries if isinstance(entry, dict) and "update" in entry]


def training_charts(entries: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return one chart for each loss in the log, the total first."""

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
            charts.append(Chart(title, caption_of(name), curve_chart(title, points, phases)))
    return charts


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the exponential average over ``SMOOTHING`` of the run, unbiased from the first value on."""
    decay = math.exp(-1 / max(SMOOTHING * len(values), 1.0))
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return about ``CURVE_POINTS`` of the points, evenly spaced, always with the last point."""
    step = math.ceil(len(points) / CURVE_POINTS)
    return [*points[:-1:step], points[-1]]


def _rules(frame: Frame, up: Axis) -> Iterator[str]:
    for value in up.ticks():
        yield f'<path class="rule" d="M{LEFT} {up(value):.1f}H{frame.right}"/>'
        yield _text(LEFT - 8, up(value) + 4, f"{value:g}", "end")


def _marks(frame: Frame, across: Axis, values: Sequence[float], name: str) -> Iterator[str]:
    for value in values:
        yield _text(across(value), frame.bottom + 18, f"{value:g}", "middle")
    yield _text((LEFT + frame.right) / 2, frame.height - 6, name, "middle")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(frame: Frame, name: str, parts: Sequence[str]) -> Markup:
    from markupsafe import Markup

    head = f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(name)}">'
    return Markup(head + "".join(parts) + "</svg>")  # safe: every text in it went through escape
