"""Sample grids while it trains: one row a prompt, the teacher's many steps beside the student's few."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..config import Recipe
from ..evaluate.generate import EncodedPrompts, SamplingSetting, decode_pictures, sample_latents
from ..seeds import seed_of

if TYPE_CHECKING:
    from .assembly import Assembly

ROWS = 6  # prompts, where the recipe names none
GAP = 4  # pixels between pictures
HEADER = 18  # pixels for the column's title


def preview_rows(parts: Assembly, prompts: Sequence[str]) -> EncodedPrompts:
    """The rows of a run's grids: its prompts, each with the task's conditions of an example.

    Args:
        prompts: the recipe's; where there are none, the first captions of the data with their own examples. The task's
            conditions of the recipe's prompts are those of the first examples, in order.
    """
    teacher, examples = parts.teacher, parts.examples
    found = examples.first_samples(len(prompts) or ROWS)
    texts = tuple(prompts or [caption for caption, _ in found])
    index = torch.tensor([found[row % len(found)][1] for row in range(len(texts))])
    conditioning = teacher.encode_prompts(texts).joined(examples.task_conditions(index, teacher.device))
    return EncodedPrompts(teacher, parts.task, texts, conditioning)


class Preview:
    """Draws the grid of one run; prompts and noise stay the same, and the teacher's pictures are made once.

    Args:
        encoded: the prompts, one row each.
    """

    def __init__(self, recipe: Recipe, encoded: EncodedPrompts) -> None:
        self.recipe = recipe
        self.encoded = encoded
        self.seeds = [seed_of(recipe.seed, "preview", row) for row in range(len(encoded.prompts))]
        self.teacher_pictures: Tensor | None = None

    def draw(self) -> Image.Image:
        """The grid with the student as it is now."""
        method, section = self.recipe.method, self.recipe.preview
        if self.teacher_pictures is None:
            guidance = sum(method.guidance) / 2 if section.guidance is None else section.guidance
            self.teacher_pictures = self._pictures(SamplingSetting("teacher", method.teacher_steps, guidance))
        columns = {f"teacher {method.teacher_steps}": self.teacher_pictures}
        for steps in sorted(section.steps, reverse=True):
            columns[f"student {steps}"] = self._pictures(SamplingSetting("student", steps))
        return picture_grid(columns)

    def _pictures(self, run: SamplingSetting) -> Tensor:
        """All rows, in batches no larger than training's; a large picture fills a decoder's memory by itself."""
        solver = self.recipe.method.solver if run.role == "teacher" else None
        size = self.recipe.batch_size
        pictures: list[Tensor] = []
        for first in range(0, len(self.seeds), size):
            rows = self.encoded.part(first, size)
            latents = sample_latents(rows, run, rows.prompts, self.seeds[first : first + size], solver)
            pictures += [decode_pictures(rows, latent[None]) for latent in latents]
        return torch.cat(pictures)


def picture_grid(columns: dict[str, Tensor]) -> Image.Image:
    """A grid with a titled column for each entry, pictures (R, 3, H, W) in [0, 1]."""
    rows, _, height, width = next(iter(columns.values())).shape
    size = (len(columns) * (width + GAP) - GAP, HEADER + rows * (height + GAP) - GAP)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=12)
    for column, (title, pictures) in enumerate(columns.items()):
        left = column * (width + GAP)
        draw.text((left + 2, 1), title, fill="black", font=font)
        for row, picture in enumerate(pictures):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            grid.paste(Image.fromarray(pixels), (left, HEADER + row * (height + GAP)))
    return grid


def save_preview(grid: Image.Image, output: Path, update: int) -> Path:
    """Write a grid into the run's folder."""
    path = output / "previews" / f"{update:08d}.webp"
    path.parent.mkdir(exist_ok=True)
    grid.save(path, quality=92)
    return path
