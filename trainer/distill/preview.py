"""Draw sample grids during training: one row per prompt, the teacher's many steps beside the student's few."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..config import Recipe
from ..evaluate.generate import EncodedPrompts, SamplingSetting, decode_pictures, sample_latents
from ..files import write_whole
from ..health.figures import PICTURE
from ..metrics.pictures.drift import drift
from ..pictures import titled_grid
from ..seeds import seed_of
from ..teachers.in_memory.stages import NETWORK
from ..teachers.in_memory.tiles import decoding_in_tiles

if TYPE_CHECKING:
    from .assembly import Assembly

ROWS = 6  # prompts of a grid, for a recipe without preview.prompts


def preview_rows(parts: Assembly, prompts: Sequence[str]) -> EncodedPrompts:
    """Return the rows of a run's grids: prompts, each with the task's conditions of an example.

    Args:
        prompts: the recipe's prompts, row n with the conditions of the nth example; without prompts, the first captions
            of the data with the conditions of their own examples.
    """
    teacher, examples = parts.teacher, parts.examples
    found = examples.first_samples(len(prompts) or ROWS)
    texts = tuple(prompts or [caption for caption, _ in found])
    index = torch.tensor([found[row % len(found)][1] for row in range(len(texts))])
    conditioning = teacher.encode_prompts(texts).joined(examples.task_conditions(index, teacher.device))
    return EncodedPrompts(teacher, parts.task, texts, conditioning)


@dataclass(frozen=True)
class Drawing:
    """A grid, and the figures of its pictures for the log: of the student with the most steps beside the teacher."""

    grid: Image.Image
    figures: dict[str, float]


class Preview:
    """Draws the grids of one run. Prompts and noise stay the same; the teacher's pictures are made once.

    Args:
        encoded: the encoded prompts, one row each.
    """

    def __init__(self, recipe: Recipe, encoded: EncodedPrompts) -> None:
        self.recipe = recipe
        self.encoded = encoded
        self.seeds = [seed_of(recipe.seed, "preview", row) for row in range(len(encoded.prompts))]
        self.teacher_pictures: Tensor | None = None

    def draw(self) -> Drawing:
        """Return the grid with the present student, and what its pictures say of the run's health."""
        columns = self.columns()
        teacher, student = list(columns.values())[:2]  # the student with the most steps comes first
        figures = drift(student, teacher)
        return Drawing(titled_grid(columns), {f"{PICTURE}{name}": value for name, value in figures.items()})

    def columns(self) -> dict[str, Tensor]:
        """Return the pictures of the teacher and of the present student by title, (rows, 3, H, W) in [0, 1] each."""
        method, section = self.recipe.method, self.recipe.preview
        if self.teacher_pictures is None:
            guidance = sum(method.guidance) / 2 if section.guidance is None else section.guidance
            self.teacher_pictures = self._pictures(
                SamplingSetting("teacher", method.teacher_steps, guidance, method.guidance_interval)
            )
        columns = {f"teacher {method.teacher_steps}": self.teacher_pictures}
        for steps in sorted(section.steps, reverse=True):
            columns[f"student {steps}"] = self._pictures(SamplingSetting("student", steps))
        return columns

    def _pictures(self, run: SamplingSetting) -> Tensor:
        """Return the pictures of all rows.

        Batches are as large as in training, and pictures are decoded one by one, so that a grid needs little more
        memory than training; with ``memory.preview_tiles`` in tiles. With ``memory.offload`` the network has left the
        device when the VAE decodes.
        """
        solver = self.recipe.method.solver if run.role == "teacher" else None
        size = self.recipe.batch_size
        stages = self.encoded.teacher.stages
        stages.enter(NETWORK)
        latents: list[Tensor] = []
        for first in range(0, len(self.seeds), size):
            rows = self.encoded.part(first, size)
            latents += sample_latents(rows, run, rows.prompts, self.seeds[first : first + size], solver)
        tiled = decoding_in_tiles(self.encoded.teacher.vae) if self.recipe.memory.preview_tiles else nullcontext()
        with tiled:
            pictures = [decode_pictures(self.encoded, latent[None]) for latent in latents]
        stages.enter(NETWORK)
        return torch.cat(pictures)


def preview_path(output: Path, update: int) -> Path:
    """Return where the grid of an update lies in a run's folder."""
    return output / "previews" / f"{update:08d}.webp"


def save_preview(grid: Image.Image, output: Path, update: int) -> Path:
    """Write a grid into the run's folder and return its path."""
    path = preview_path(output, update)
    write_whole(path, lambda partial: grid.save(partial, "WEBP", quality=92))
    return path
