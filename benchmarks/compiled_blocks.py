"""What ``speed.compile: blocks`` gives on this machine: seconds of a pass with and without it, by turns in one process.

    python -m benchmarks.compiled_blocks
    python -m benchmarks.compiled_blocks --family sdxl --path FOLDER --device cuda --precision bf16

A pass of the teacher without gradients, and a pass of the student with its backward pass, on random latents. The median
of the rounds counts; compiling is timed apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from flash_diffusion.trainer.config import ModelSection
from flash_diffusion.trainer.teachers import load_teacher
from flash_diffusion.trainer.teachers.base import Teacher
from flash_diffusion.trainer.teachers.in_memory.compiled_blocks import compile_blocks


def passes(teacher: Teacher, batch: int, precision: str) -> dict[str, Callable[[], None]]:
    """Return the passes that are timed, by name."""
    denoiser, device = teacher.denoiser, teacher.device
    z = torch.randn(batch, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    asked = torch.full((batch,), denoiser.process.timestep(0.5), device=device), teacher.unconditional(batch)

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device.type, enabled=precision == "bf16", dtype=torch.bfloat16):
            denoiser.predict(z, *asked)
        finished()

    def with_backward() -> None:
        with denoiser.role("student"):
            with torch.autocast(device.type, enabled=precision == "bf16", dtype=torch.bfloat16):
                loss = denoiser.predict(z, *asked).square().mean()
            loss.backward()
        finished()

    return {"teacher, forward": forward, "student, forward and backward": with_backward}


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that work takes: of the processor on a CPU, of the clock on another device."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="demo")
    parser.add_argument("--path", help="of the model (default: the demo)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    works = []
    for compiled in (False, True):
        teacher = load_teacher(ModelSection(family=args.family, path=args.path), args.device)
        teacher.denoiser.add_adapter("student", args.rank, args.rank, teacher.default_targets)
        clock = compile_blocks(teacher.denoiser.network, teacher.device) if compiled else None
        works.append(passes(teacher, args.batch, args.precision))
    for name in works[0]:
        for work in works:
            work[name]()  # compiles, and fills the allocator
        rounds = [[timed(work[name], teacher.device) for work in works] for _ in range(args.rounds)]
        plain, fast = (median(one) for one in zip(*rounds, strict=True))
        sys.stdout.write(f"{name}: {plain:.3f} s plain, {fast:.3f} s compiled, {plain / fast:.2f} x\n")
    sys.stdout.write(f"{clock}\n")


if __name__ == "__main__":
    main()
