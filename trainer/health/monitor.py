"""Watch a run's log by the rules, and say once what goes wrong, once when it is over, and at the end how it went.

What a monitor knows follows from the lines alone: a resumed run reads the lines that are there, and goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Recipe
from .advice import advice
from .figures import OVER, PICTURE, SHARE, WARNINGS
from .rules import RULES, Rule

WINDOWS = 20  # of a run: a rule's window is this part of the updates, where the rule wants no longer one
MOST = 200  # updates of a window, however long the run is


@dataclass(frozen=True)
class Alarm:
    """A rule that was broken.

    Attributes:
        text: what is bad, and what to do.
    """

    rule: Rule
    text: str


@dataclass
class _Watch:
    """What a rule has seen.

    Attributes:
        window: (update, value), the last ones.
        start: the update before the first value of the window's first filling.
        best: the best smoothed value.
        sound: the last update with a good smoothed value, and the value.
    """

    window: deque[tuple[int, float]] = field(default_factory=deque)
    start: int | None = None
    best: float | None = None
    sound: tuple[int, float] | None = None
    alarm: Alarm | None = None


class HealthMonitor:
    """Watches one run.

    Args:
        recipe: for the windows, and for the fields that advice names.
        lines: entries of the log that are there already.
    """

    def __init__(self, recipe: Recipe, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.recipe = recipe
        self._watches = [_Watch() for _ in RULES]
        self._phase: str | None = None
        self._last_update = 0
        self._shares: dict[str, float] = {}
        self._pictures: dict[str, float] = {}
        self.ended: list[tuple[Alarm, int]] = []
        for entry in lines:
            self.observe(entry)

    @property
    def alarms(self) -> list[Alarm]:
        """The rules that are broken now."""
        return [watch.alarm for watch in self._watches if watch.alarm is not None]

    def observe(self, entry: Mapping[str, Any]) -> dict[str, list[str]]:
        """Take in a line of the log.

        Returns:
            ``warnings``, sentences on what has begun to go wrong, and ``over``, on what is good again; a key without
            sentences is left out.
        """
        found: dict[str, list[str]] = {WARNINGS: [], OVER: []}
        phase, update = str(entry.get("phase", "")), int(entry["update"])
        if self._phase not in (None, phase):
            found[OVER] += self._begin_phase(phase, update)
        self._phase = phase
        self._shares = {name: value for name, value in entry.items() if name.startswith(SHARE)} or self._shares
        self._pictures = {name: value for name, value in entry.items() if name.startswith(PICTURE)} or self._pictures
        for rule, watch in zip(RULES, self._watches, strict=True):
            if isinstance(value := entry.get(rule.figure), (int, float)):
                self._judge(rule, watch, update, float(value), found)
        self._last_update = update
        return {key: sentences for key, sentences in found.items() if sentences}

    def summary(self) -> str:
        """Return a paragraph on the run's health so far; empty where no rule has seen enough."""
        if all(watch.best is None for watch in self._watches) and not self.ended:
            return ""
        lasting, over = self.alarms, len(self.ended)
        words = "Nothing was found wrong." if not lasting and not over else ""
        if over:
            words = f"{over} warning{'s were' if over > 1 else ' was'} over before the end. "
        if lasting:
            words += "To the end: " + " ".join(f"{alarm.text[0].upper()}{alarm.text[1:]}." for alarm in lasting)
        return " ".join(f"{words} {self._at_the_end()}".split())

    def _at_the_end(self) -> str:
        """Return a sentence on the last pictures, empty without any."""
        names = ("contrast", "luminance", "saturation", "sharpness", "diversity")
        there = {name: self._pictures[PICTURE + name] for name in names if PICTURE + name in self._pictures}
        if not there:
            return ""
        listed = ", ".join(f"{name} {value:.2f}" for name, value in there.items())
        return f"The last preview's pictures, the student's divided by the teacher's: {listed}."

    def _begin_phase(self, phase: str, update: int) -> list[str]:
        """Forget what the last phase's figures say about the next one's."""
        told = []
        for rule, watch in zip(RULES, self._watches, strict=True):
            if rule.per_phase:
                if watch.alarm is not None:
                    told.append(f"phase {phase} begins, whose {rule.figure.replace('_', ' ')} is judged anew")
                    self.ended.append((watch.alarm, update))
                watch.window.clear()
                watch.start = watch.best = watch.sound = watch.alarm = None
        return told

    def _judge(self, rule: Rule, watch: _Watch, update: int, value: float, found: dict[str, list[str]]) -> None:
        smoothed = self._smoothed(rule, watch, update, value)
        if smoothed is None:
            return
        if watch.best is None or rule.test.nearer(smoothed, watch.best):
            watch.best = smoothed
        best = watch.best
        if watch.alarm is None and rule.test.begins(smoothed, best):
            since, before = watch.sound or (update, best)
            todo = advice(rule, self.recipe, self._phase, self._shares)
            text = f"{rule.words(smoothed, before, since)}. {todo}"
            watch.alarm = Alarm(rule, text)
            found[WARNINGS].append(text)
        elif watch.alarm is not None and rule.test.ends(smoothed, best):
            self.ended.append((watch.alarm, update))
            watch.alarm = None
            found[OVER].append(rule.good(smoothed))
        if rule.test.ends(smoothed, best):
            watch.sound = (update, smoothed)

    def _smoothed(self, rule: Rule, watch: _Watch, update: int, value: float) -> float | None:
        """Return the mean over the rule's window, None while the window is not full."""
        if rule.updates is None:
            return value
        length = max(rule.updates, min(MOST, self.recipe.updates // WINDOWS))
        if watch.start is None:
            watch.start = self._last_update
        watch.window.append((update, value))
        while watch.window[0][0] <= update - length:
            watch.window.popleft()
        if update - watch.start < length:
            return None
        return sum(value for _, value in watch.window) / len(watch.window)
