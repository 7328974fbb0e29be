"""The error of the teacher's solutions by solver and number of steps, against many steps: which K is enough.

    python -m benchmarks.solver_error                              # the demo's teacher, guidance 3
    python -m benchmarks.solver_error --model glyphs --guidance 2

Mean squared error of the latents, from the same noise and captions, over the variance of the reference. The reference
is DPM-Solver++(2M) with ``--reference`` steps, which has an error of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from flash_diffusion.flash_core.denoiser import guided_z0
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.solvers import Solver, solve
from flash_diffusion.trainer.config import DataSection, ModelSection
from flash_diffusion.trainer.evaluate.teacher.captions import read_captions
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher

SOLVERS: tuple[Solver, ...] = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc")
STEPS = (4, 8, 12, 16, 20, 32)


def solutions(teacher: Teacher, captions: list[str], guidance: float, solver: Solver, steps: int) -> Tensor:
    """Return the teacher's solutions (B, C, h, w), from the same noise at each call."""
    denoiser, process = teacher.denoiser, teacher.denoiser.process
    conditioning, unconditional = teacher.encode_prompts(captions), teacher.unconditional(len(captions))
    noise = torch.randn(len(captions), *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    scale = torch.full((len(captions),), guidance)
    with torch.inference_mode(), denoiser.role("teacher"):
        return solve(
            lambda z, t, _: guided_z0(denoiser, z, t, conditioning, unconditional, scale),
            process,
            noise,
            trailing_timesteps(process, steps),
            solver=solver,
        )


def table(teacher: Teacher, captions: list[str], guidance: float, reference: int) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    exact = solutions(teacher, captions, guidance, "dpmpp_2m", reference)
    yield f"| K | {' | '.join(SOLVERS)} |"
    yield "|---|" + "---|" * len(SOLVERS)
    for steps in STEPS:
        found = (solutions(teacher, captions, guidance, solver, steps) for solver in SOLVERS)
        yield f"| {steps} | {' | '.join(f'{float((z - exact).square().mean() / exact.var()):.2g}' for z in found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="glyphs, the second embedded teacher (default: the demo's)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=24, help="pictures (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=64, help="K of the reference (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher(ModelSection(family="demo", path=args.model))
    captions = read_captions(DataSection(source="demo-glyphs" if args.model else "demo"), args.samples)
    captions = [captions[index % len(captions)] for index in range(args.samples)]
    for line in table(teacher, captions, args.guidance, args.reference):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
