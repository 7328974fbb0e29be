"""Pictures and figures of a run: teacher and student from the same new noise, and the curve of the losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ....flash_core.denoiser import predict_z0
from ....flash_core.distiller import Distiller
from ....flash_core.grid import trailing_timesteps
from ....flash_core.runs.seeds import stream
from ....flash_core.sampler import few_step_sample
from ...sampling.contact_sheet import draw_grid
from .examples import Examples

STEPS = (4, 2, 1)  # the student's step counts
SAMPLES = 8  # that the figures are measured on
ROWS = 4  # of these are shown as pictures
CURVE_HEIGHT = 140  # pixels
CURVE_WIDTH = 512  # of a curve without pictures
BAND = 25  # updates of the curve's moving mean, at most a tenth of the run

Decode = Callable[[Tensor], Tensor]  # latents (B, C, h, w), scaled for the network -> pictures (B, H, W, 3) in 0..1


class Bench:
    """Draws the same samples with teacher and student. Their noise is new: no trajectory starts from it.

    The student runs without fresh noise here, so that teacher and student draw the same picture from one noise.

    Args:
        distiller: teacher and student.
        examples: the first prompts are drawn.
        guidance: of the teacher.
        seed: of the noise.
        at_once: samples that the network takes at once.
    """

    def __init__(self, distiller: Distiller, examples: Examples, guidance: float, seed: int, at_once: int) -> None:
        self.distiller = distiller
        self.examples = examples
        self.guidance = guidance
        self.at_once = at_once
        drawn = torch.randn(SAMPLES, *examples.shape, generator=stream(seed, "preview"))
        self.noise = drawn.to(examples.device)
        self._teacher: Tensor | None = None

    @property
    def teacher(self) -> Tensor:
        """The guided teacher's solutions, (SAMPLES, C, h, w); they are computed once."""
        if self._teacher is None:
            self._teacher = torch.cat([self._solve(rows) for rows in self._batches()])
        return self._teacher

    @torch.no_grad()
    def student(self, steps: int, samples: int = SAMPLES) -> Tensor:
        """Return the student's first ``samples`` solutions in a few steps."""
        with self.distiller.denoiser.role("student"):
            return torch.cat([self._draw(rows, steps) for rows in self._batches(samples)])

    def errors(self) -> dict[int, float]:
        """Return {step count: mean squared distance of the student's latents to the teacher's / their variance}."""
        scale = float(self.teacher.var())
        return {steps: float((self.student(steps) - self.teacher).square().mean()) / scale for steps in STEPS}

    def grid(self, decode: Decode) -> Tensor:
        """Return a picture (1, H, W, 3) with a column for the teacher and one for each of the student's step counts."""
        pictures = [decode(self.teacher[:ROWS])]
        pictures += [decode(self.student(steps, ROWS)) for steps in STEPS]
        labels = [f"teacher, {len(self.distiller.timesteps)} steps"]
        labels += [f"student, {steps} step{'' if steps == 1 else 's'}" for steps in STEPS]
        return draw_grid(pictures, labels)

    def _batches(self, samples: int = SAMPLES) -> list[Tensor]:
        return list(torch.arange(samples).split(self.at_once))

    @torch.no_grad()
    def _solve(self, rows: Tensor) -> Tensor:
        guidance = torch.full((len(rows),), self.guidance, device=self.examples.device)
        return self.distiller.teacher_solution(self.noise[rows], *self.examples.conditions_of(rows), guidance)

    def _draw(self, rows: Tensor, steps: int) -> Tensor:
        denoiser = self.distiller.denoiser
        timesteps = trailing_timesteps(denoiser.process, steps)
        conditions, _ = self.examples.conditions_of(rows)
        alphas, sigmas = denoiser.process.alpha_sigma(torch.tensor(timesteps, dtype=torch.float64))

        def z0(z: Tensor, index: int) -> Tensor:
            t = torch.full((len(z),), timesteps[index], device=z.device)
            return predict_z0(denoiser, z, t, conditions)

        z = self.noise[rows]
        levels = alphas.tolist(), sigmas.tolist()
        return few_step_sample(z0, z, *levels, lambda: torch.zeros_like(z), stochasticity=0.0)


def report_picture(bench: Bench, decode: Decode | None, losses: Sequence[float]) -> Tensor:
    """Return the grid with the losses' curve below it, (1, H, W, 3); the curve alone where nothing decodes latents."""
    if decode is None:
        return loss_curve(losses, CURVE_WIDTH)
    grid = bench.grid(decode)
    return torch.cat([grid, loss_curve(losses, grid.shape[2])], dim=1)


def loss_curve(losses: Sequence[float], width: int, height: int = CURVE_HEIGHT) -> Tensor:
    """Draw the moving mean of the losses on a logarithmic axis; return a picture (1, height, width, 3) in 0..1.

    Args:
        losses: of each update, above 0.
    """
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    draw.text((6, 4), f"distillation loss, {len(losses)} updates", "black", font)
    band = max(1, min(BAND, len(losses) // 10))
    means = np.convolve(np.asarray(losses, dtype=np.float64), np.full(band, 1 / band), mode="valid")
    values = np.log(np.maximum(means, 1e-12))
    low, high = float(values.min()), float(values.max())
    left, top, right, bottom = 56, 24, width - 8, height - 10
    draw.rectangle((left, top, right, bottom), outline="#cccccc")
    for value, y in ((means.max(), top), (means.min(), bottom - 12)):
        draw.text((6, y), f"{value:.3g}", "black", font)
    across = np.linspace(left, right, len(values))
    down = bottom - (values - low) / max(high - low, 1e-9) * (bottom - top)
    points = list(zip(across.tolist(), down.tolist(), strict=True))
    if len(points) > 1:
        draw.line(points, fill="#1f5fbf", width=2)
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]


def as_image(picture: Tensor) -> Image.Image:
    """Return a picture (1, H, W, 3) in 0..1 as Pillow's."""
    return Image.fromarray((picture[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
