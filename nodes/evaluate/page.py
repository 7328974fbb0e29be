"""The report of Flash Evaluate: a table with its words, and a grid of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...flash_core.measures.confidence_intervals import Estimate
from ..sampling.compare import FLASH_GUIDANCE
from ..sampling.contact_sheet import draw_grid
from ..shared.schema import count
from .drawing import FLASH, MODEL, Request, Run, named
from .figures import Figures, Row

ENOUGH = 64  # pictures of a run; below, a note says that small differences are chance

HEAD = (
    "| | steps | guidance | passes | distance | same picture | diversity | sharpness | contrast | s / picture |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)
MEANINGS = (
    "distance: Fréchet distance to the teacher's pictures from other noise, in features of a network with random "
    "weights, which no loss has seen. 1 is as near as the teacher is to itself (the floor). In brackets: the interval "
    "of 95 %.",
    "same picture: distance of each picture to the teacher's from the same noise. 0 is the same picture, 1 is as "
    "different as with another seed.",
    "diversity: how much the pictures of one prompt differ; sharpness: mean squared difference of neighbouring pixels; "
    "contrast: deviation of the brightness. The teacher's are 1.",
    "passes: evaluations of the network for each picture; guidance takes two a step. s / picture: seconds to sample, "
    "loading included, VAE not.",
)


class Report:
    """The figures of all runs, in words and pictures.

    Args:
        request: what was drawn.
        runs: the teacher's two sets first, as :func:`~.drawing.draw` returns them.
        prompts: a name of each prompt.
    """

    def __init__(self, request: Request, runs: Sequence[Run], prompts: Sequence[str]) -> None:
        self.request = request
        self.prompts = prompts
        self.teacher, other, *self.runs = runs
        names = [f"{number} {prompt}" for number, prompt in enumerate(prompts) for _ in range(request.per_prompt)]
        self.figures = Figures(self.teacher.pictures, other.pictures, names)
        self.rows = [self.figures.of(run.pictures) for run in self.runs]

    def verdicts(self) -> list[str]:
        """Return a sentence for each of Flash's step counts: is it nearer than the model with as many passes?"""
        found = []
        for run, row in zip(self.runs, self.rows, strict=True):
            rivals = [
                (other_row.distance.value or 0.0, other)
                for other, other_row in zip(self.runs, self.rows, strict=True)
                if other.way.title == MODEL and other.passes == run.passes
            ]
            if run.way.title != FLASH or not rivals:
                continue
            distance, rival = min(rivals, key=lambda pair: pair[0])
            difference = self.figures.nearer(run.pictures, rival.pictures)
            found.append(
                f"At {count(run.way.steps, 'step')} Flash is {_comparison(difference)} the undistilled model with as "
                f"many passes: {_number(row.distance.value)} and {_number(distance)} ({named(rival.way)})."
            )
        return found

    def text(self, remarks: Sequence[str]) -> str:
        """Return the table, what it says in words, and what its columns mean.

        Args:
            remarks: lines on the models.
        """
        request, teacher = self.request, self.teacher
        pictures = len(self.prompts) * request.per_prompt
        height, width = teacher.size
        lines = [
            f"{count(len(self.prompts), 'prompt')}, {request.per_prompt} pictures of {width} x {height} pixels of each "
            "prompt in every run",
            f"teacher: {count(request.teacher_steps, 'step')} of {request.sampler_name}, {request.scheduler}, at "
            f"guidance {request.guidance:g}",
            "",
            *HEAD,
            _cells(teacher, "1.00", ["0.00", "1.00", "1.00", "1.00"]),
            *(_row(run, row) for run, row in zip(self.runs, self.rows, strict=True)),
            "",
            *self.verdicts(),
            "",
        ]
        if pictures < ENOUGH:
            lines.append(
                f"NOTE: {pictures} pictures a run are few, so distances are measured in "
                f"{count(self.figures.directions, 'direction')} only. Small differences show from {ENOUGH} pictures "
                "on: raise per_prompt, or write more prompts."
            )
        return "\n".join([*lines, *remarks, "", *MEANINGS])

    def picture(self) -> Tensor:
        """Return a picture (1, H, W, 3): a column for each run, a row for each of the first prompts."""
        labels = [_label(self.teacher)]
        labels += [
            f"{_label(run)}\ndistance {_number(row.distance.value)}"
            for run, row in zip(self.runs, self.rows, strict=True)
        ]
        return draw_grid([run.shown for run in (self.teacher, *self.runs)], labels)


def _comparison(difference: Estimate) -> str:
    if (difference.low or 0.0) > 0:
        return "clearly nearer to the teacher than"
    if (difference.high or 0.0) < 0:
        return "clearly farther from the teacher than"
    return "about as near to the teacher as"


def _row(run: Run, row: Row) -> str:
    distance = row.distance
    with_interval = f"{_number(distance.value)} ({_number(distance.low)} to {_number(distance.high)})"
    others = (row.likeness, row.diversity, row.sharpness.value, row.contrast.value)
    return _cells(run, with_interval, [_number(value) for value in others])


def _cells(run: Run, distance: str, others: Sequence[str]) -> str:
    way = run.way
    cells = [way.title, f"{way.steps}", f"{way.guidance:g}", f"{run.passes:g}", distance, *others, f"{run.seconds:.2f}"]
    return f"| {' | '.join(cells)} |"


def _label(run: Run) -> str:
    guided = f"\nguidance {run.way.guidance:g}" if run.way.guidance != FLASH_GUIDANCE else ""
    passes = "1 pass" if run.passes == 1 else f"{run.passes:g} passes"
    return f"{run.way.title}, {count(run.way.steps, 'step')}{guided}\n{passes}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
