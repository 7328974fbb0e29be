"""The paper's public training step, restated, against ours: images a second and resident memory, as ratios.

    python -m benchmarks.paper_step                 # minutes of a free core
    python -m benchmarks.paper_step --memory paper  # one process that prints its memory; the command above starts both

The restated step (arXiv 2406.02347, section 4, as its public code arranges it) holds a copy of the network for the
teacher and one for the student. It draws one start and one guidance scale for a batch, asks the teacher for its two
branches one after the other, and goes through the whole step once for each of its two optimisers: the rollout is solved
twice. Ours is what ``flash-diffusion distill`` does. Both have a random UNet of 16.5 M parameters, the same LoRA, heads
on the same hidden states, all terms of the last phase and the same starts. They take turns in one process, in
one thread; seconds are of the processor, so that other processes count little.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from flash_diffusion.flash_core import losses
from flash_diffusion.flash_core.denoiser import Conditioning, predict_z0
from flash_diffusion.flash_core.discriminator import Discriminator
from flash_diffusion.flash_core.distiller import (
    ADVERSARIAL_TIMESTEPS,
    PUBLISHED_PHASES,
    Distiller,
    DistillerSettings,
    Phase,
)
from flash_diffusion.flash_core.grid import trailing_timesteps
from flash_diffusion.flash_core.process import VPProcess
from flash_diffusion.flash_core.rollout import Trajectory
from flash_diffusion.flash_core.solvers import Solver, solve
from flash_diffusion.flash_core.terms.shared_batch import Random
from flash_diffusion.trainer.teachers.families.stable_diffusion import UNetDenoiser

PHASE = PUBLISHED_PHASES[-1]
# The starts of five samples, as shares of the grid, in the proportions of the phase's modes (0.4, 0.2, 0.2, 0.2). Five
# updates have the same starts whether a batch shares one or each sample has its own.
STARTS = (0.0, 0.0, 0.25, 0.5, 0.75)
LATENTS = (4, 16, 16)
TOKENS, WIDTH = 16, 160
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 16
RECORDED = 16  # trajectories recorded at once
USES = (4, 8, 16)


def network() -> UNet2DConditionModel:
    """Return a random UNet of 16.5 M parameters."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=LATENTS[1], in_channels=LATENTS[0], out_channels=LATENTS[0], layers_per_block=2,
        block_out_channels=(80, 136, 224), cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def heads(denoiser: UNetDenoiser) -> Discriminator:
    """Return the discriminator's heads for the hidden states of a network."""
    z, t = torch.zeros(1, *LATENTS), torch.full((1,), 500.0)
    with torch.no_grad():
        features = denoiser.features(z, t, text(1))
    return Discriminator([feature.shape[1] for feature in features])


def text(batch: int, seed: int = 0) -> Conditioning:
    """Return random token embeddings of a batch."""
    return Conditioning(torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)))


class PaperStep:
    """Two copies of the network, a rollout for each optimiser, one start a batch, guidance in two calls."""

    def __init__(self, batch: int, steps: int) -> None:
        self.batch = batch
        self.process = VPProcess.from_betas()
        self.teacher = UNetDenoiser(network(), self.process)
        self.student = UNetDenoiser(network(), self.process)
        self.student.add_adapter("student", RANK, RANK, TARGETS)
        self.kept = ExitStack()
        self.kept.enter_context(self.student.role("student"))  # for good: this copy is the student alone
        self.discriminator = heads(self.teacher)
        self.grid = trailing_timesteps(self.process, steps)
        self.starts = cycle(int(share * steps) for share in STARTS)
        self.start = 0
        self.generator = torch.Generator().manual_seed(0)
        self.optimizers = [
            torch.optim.AdamW(self.student.adapter_parameters("student").values(), 1e-5),
            torch.optim.AdamW(self.discriminator.parameters(), 1e-5),
        ]

    def update(self) -> None:
        """Make one update of the student, and one of the heads."""
        self.start = next(self.starts)
        for optimizer, loss in zip(self.optimizers, (self._student_loss, self._heads_loss), strict=True):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _forward(self) -> tuple[Tensor, Tensor, float, Conditioning, Conditioning]:
        """Return the student's outputs, the teacher's solutions, the guidance scale and the conditions."""
        start = self.start
        scale = 3 + 10 * float(torch.rand(1, generator=self.generator))
        noise, z0 = self._normal(), self._normal()
        t = torch.full((self.batch,), self.grid[start])
        z_t = noise if start == 0 else self.process.add_noise(z0, noise, t)
        given, empty = text(self.batch, 1), text(self.batch, 2)

        def guided(z: Tensor, times: Tensor, _rows: Tensor) -> Tensor:
            with_condition = predict_z0(self.teacher, z, times, given)
            without = predict_z0(self.teacher, z, times, empty)
            return without + scale * (with_condition - without)

        with torch.no_grad():
            z_teacher = solve(guided, self.process, z_t, self.grid, [start] * self.batch)
        z_student = predict_z0(self.student, z_t, t, given)
        return z_student, z_teacher, scale, given, empty

    def _student_loss(self) -> Tensor:
        z_student, z_teacher, scale, given, empty = self._forward()
        loss = PHASE.distillation * losses.latent_loss("mse", z_student, z_teacher)
        fake = self.discriminator(self._features(z_student, given, self._renoising()))
        loss = loss + PHASE.adversarial * losses.generator_loss("lsgan", fake, None)
        times = torch.randint(1000, (self.batch,), generator=self.generator)
        with torch.no_grad():
            z_t = self.process.add_noise(z_student, self._normal(), times)
            with_condition = predict_z0(self.teacher, z_t, times, given)
            without = predict_z0(self.teacher, z_t, times, empty)
            real = without + scale * (with_condition - without)
            score = predict_z0(self.student, z_t, times, given)
        loss = loss + PHASE.dmd * losses.distribution_matching_loss(z_student, real, score, "mse")
        return loss

    def _heads_loss(self) -> Tensor:
        with torch.no_grad():
            z_student, z_teacher, _, given, _ = self._forward()
            renoising = self._renoising()
            fake, real = (self._features(z, given, renoising) for z in (z_student, z_teacher))
        return losses.discriminator_loss("lsgan", self.discriminator(real), self.discriminator(fake))

    def _features(self, z: Tensor, given: Conditioning, renoising: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return the hidden states of a whole pass of the teacher."""
        t, noise = renoising
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _block, _inputs, output: states.append(self.teacher.as_map(output, z)))
            for block in self.teacher.feature_blocks()
        ]
        self.teacher.predict(self.process.add_noise(z, noise, t), t, given)
        for hook in hooks:
            hook.remove()
        return states

    def _renoising(self) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(len(ADVERSARIAL_TIMESTEPS), (self.batch,), generator=self.generator)
        return torch.tensor(ADVERSARIAL_TIMESTEPS)[drawn], self._normal()

    def _normal(self) -> Tensor:
        return torch.randn(self.batch, *LATENTS, generator=self.generator)


class FixedStarts(Distiller):
    """The distiller with the starts of the benchmark, one sample after the other."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.starts = cycle(int(share * self.settings.teacher_steps) for share in STARTS)

    def draw_indices(self, phase: Phase, allowed: Sequence[int], batch: int, generator: Random) -> list[int]:
        return [next(self.starts) for _ in range(batch)]


class OurStep:
    """One base with roles, one rollout an update, a start for each sample, guidance in one batch."""

    def __init__(self, batch: int, steps: int, solver: Solver = "dpmpp_2m") -> None:
        self.batch = batch
        denoiser = UNetDenoiser(network(), VPProcess.from_betas())
        denoiser.add_adapter("student", RANK, RANK, TARGETS)
        discriminator = heads(denoiser)
        settings = DistillerSettings(teacher_steps=steps, solver=solver)
        self.distiller = FixedStarts(denoiser, settings, discriminator=discriminator)
        self.generator = torch.Generator().manual_seed(0)
        self.optimizers = [
            torch.optim.AdamW(denoiser.adapter_parameters("student").values(), 1e-5, fused=True),
            torch.optim.AdamW(discriminator.parameters(), 1e-5, fused=True),
        ]

    def update(self, recorded: Trajectory | None = None) -> None:
        """Make one update of the student, and one of the heads, from a fresh rollout or a recorded trajectory."""
        if recorded is None:
            z0, *conditions = self._inputs(self.batch)
            rollout = self.distiller.rollout(z0, *conditions, PHASE, self.generator)
        else:
            rollout = self.distiller.replay(recorded, PHASE, self.generator)
        step = self.distiller.student_step(rollout, PHASE, self.generator)
        self.distiller.discriminator_step(rollout, step.z_student, self.generator, seen=step.seen)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def record(self, count: int) -> Trajectory:
        """Record trajectories from pure noise."""
        return self.distiller.trajectory(*self._inputs(count), self.generator)

    def _inputs(self, batch: int) -> tuple[Tensor, Conditioning, Conditioning]:
        return torch.randn(batch, *LATENTS, generator=self.generator), text(batch, 1), text(batch, 2)


@dataclass(frozen=True)
class Ratios:
    """How often ours is as fast as the paper's step, in one pair of measurements: name -> ratio, by images a second."""

    seconds: dict[str, float]

    def of(self, name: str) -> float:
        """Return the ratio of a row."""
        return self.seconds["paper"] / self.seconds[name]


def timed(work: Callable[[], object], times: int) -> float:
    """Return the processor's seconds of one call, in the mean of ``times``."""
    before = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - before) / times


def measure(batch: int, steps: int, pairs: int, solvers: Sequence[tuple[Solver, int]]) -> list[Ratios]:
    """Return the seconds of an image, paper and ours by turns."""
    paper, ours, updates = PaperStep(batch, steps), OurStep(batch, steps), len(STARTS)
    others = {f"fresh, {solver} {count}": OurStep(batch, count, solver) for solver, count in solvers}
    whole = ours.record(RECORDED)
    recorded = whole.rows(torch.arange(batch))
    results = []
    for _ in range(pairs):
        seconds = {"paper": timed(paper.update, updates) / batch, "fresh": timed(ours.update, updates) / batch}
        solution = timed(lambda: ours.record(RECORDED), 1) / RECORDED
        learning = timed(lambda: ours.update(recorded), updates) / batch
        seconds |= {name: timed(step.update, updates) / batch for name, step in others.items()}
        seconds |= {f"replay, {uses} uses": learning + solution / uses for uses in USES}
        results.append(Ratios(seconds))
        sys.stderr.write(", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()) + "\n")
    return results


def resident(field: str) -> float:
    """Return a line of Linux' account of this process in MB: ``VmRSS`` now, ``VmHWM`` at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{field}:"))


def print_memory(kind: str, batch: int, steps: int) -> None:
    """Print the peak of resident memory of five updates, above that of a process that has imported everything."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    step = PaperStep(batch, steps) if kind == "paper" else OurStep(batch, steps)
    for _ in STARTS:
        step.update()
    sys.stdout.write(f"{resident('VmHWM') - before:.0f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="samples of an update (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="K of both (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="times that both take turns (default: %(default)s)")
    parser.add_argument(
        "--solver", nargs="*", default=[], metavar="NAME=K", help="more rows of ours, such as dpmpp_3m=20"
    )
    parser.add_argument("--memory", choices=["paper", "ours"], help="print the memory of one, in MB, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print_memory(args.memory, args.batch, args.steps)
        return
    parameters = sum(value.numel() for value in network().parameters())
    solvers = [(name, int(count)) for name, count in (text.split("=") for text in args.solver)]
    results = measure(args.batch, args.steps, args.pairs, solvers)
    write = sys.stdout.write
    write(f"UNet of {parameters / 1e6:.1f} M, latents {LATENTS}, K = {args.steps}, batch {args.batch}, one thread\n\n")
    write("| Ours | Images a second, the paper's step = 1 | Pairs |\n|---|---|---|\n")
    for name in results[0].seconds:
        ratios = [result.of(name) for result in results]
        if name != "paper":
            write(f"| {name} | {statistics.median(ratios):.2f} x | {', '.join(f'{one:.2f}' for one in ratios)} |\n")
    paper, ours = (
        float(subprocess.run([*_self(args), "--memory", kind], check=True, capture_output=True, text=True).stdout)
        for kind in ("paper", "ours")
    )
    write(f"\nResident memory without imports: ours {ours:.0f} MB, paper {paper:.0f} MB: {ours / paper:.2f} x\n")


def _self(args: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", __spec__.name, "--batch", str(args.batch), "--steps", str(args.steps)]


if __name__ == "__main__":
    main()
