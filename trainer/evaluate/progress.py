"""Show how far an evaluation is: bars in a terminal, a line now and then in a pipe or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..progress import in_words

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY = 20.0  # seconds between lines where no bar can be drawn


class LineProgress(Progress):
    """Counts as rich's bars do, and prints a line when the last one is some seconds old. It never redraws a line."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._told = self.get_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count work as done."""
        super().advance(task_id, advance)
        now = self.get_time()
        if now - self._told < LINE_EVERY:
            return
        self._told = now
        task = self._tasks[task_id]
        left = in_words(task.time_remaining)
        self.console.print(
            f"{task.description}: {task.completed:.0f} of {task.total or 0:.0f} {task.fields['unit']}, {left} left",
            highlight=False,
            soft_wrap=True,
        )


def progress_bar(console: Console | None) -> Progress:
    """Return a progress whose tasks have a ``unit`` each (passes, pictures).

    Args:
        console: a terminal gets bars, anything else lines; None shows nothing.
    """
    if console is not None and not console.is_terminal:
        return LineProgress(console)
    return Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )
