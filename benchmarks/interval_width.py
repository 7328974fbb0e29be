"""How wide the 95 % interval of a Fréchet distance is beside chance itself, by simulation.

    python -m benchmarks.interval_width [--repeats 200]

Features are Gaussian: 64 numbers of falling size, half of whose variance belongs to the prompt, which a run and the
teacher's set share. 256 pictures a run, 512 of the teacher. Each repeat draws everything anew. So the spread over the
repeats is chance, and ``flash_core.measures.half_samples`` must not call it smaller. A ratio of 1 is exact, above 1 the
intervals are too wide.
"""

from __future__ import annotations

import argparse

import torch

from flash_diffusion.flash_core.measures import half_samples
from flash_diffusion.flash_core.measures.distances import frechet_distance
from flash_diffusion.flash_core.measures.half_samples import NORMAL, Halves

FEATURES, PICTURES, TIMES = 64, 256, 2
SIZES = torch.linspace(2, 0.2, FEATURES)  # standard deviations
STUDENTS = {"as the teacher": 0.0, "1.2 x the floor": 0.15, "3 x the floor": 0.5}  # offset of every feature


def simulate(offset: float, seed: int) -> list[tuple[float, float]]:
    """Return (value, half width of its interval) of a student's distance, and of its difference from the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(PICTURES, FEATURES, generator=generator)

    def pictures(rows: torch.Tensor) -> torch.Tensor:
        return (rows + torch.randn(rows.shape, generator=generator)) * SIZES / 2**0.5

    reference, student, teacher = pictures(prompts.repeat(TIMES, 1)), pictures(prompts) + offset, pictures(prompts)
    halves = Halves(reference, PICTURES)
    values = [frechet_distance(made, reference) for made in (student, teacher)]
    on_halves = [halves.distances(made) for made in (student, teacher)]
    found = []
    for value, spread in ((values[0], on_halves[0]), (values[0] - values[1], on_halves[0] - on_halves[1])):
        estimate = half_samples.around(value, spread, PICTURES)
        assert estimate.high is not None
        found.append((value, estimate.high - value))
    return found


def main() -> int:
    """Print a row for each student; return the exit code."""
    parser = argparse.ArgumentParser(description="Compare intervals of Fréchet distances with chance.")
    parser.add_argument("--repeats", type=int, default=200, help="draws of everything (default: %(default)s)")
    repeats = parser.parse_args().repeats
    print("| Student | distance | interval / chance | of the difference from the teacher |\n|---|---|---|---|")  # noqa: T201
    for name, offset in STUDENTS.items():
        found = torch.tensor([simulate(offset, seed) for seed in range(repeats)], dtype=torch.float64)
        ratios = found[:, :, 1].mean(0) / (NORMAL * found[:, :, 0].std(0))
        print(f"| {name} | {float(found[:, 0, 0].mean()):.2f} | {float(ratios[0]):.2f} | {float(ratios[1]):.2f} |")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
