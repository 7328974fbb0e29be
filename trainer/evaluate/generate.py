"""Make pictures with a teacher or its student. Each picture has its own seed, so it is the same in any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...flash_core.denoiser import Conditioning, Denoiser
    from ...flash_core.process import Process
    from ...flash_core.solvers import Solver
    from ..tasks.base import Task
    from ..teachers.base import Teacher
    from ..teachers.denoiser import DiffusersDenoiser

# The activations of more pictures fall out of a CPU cache: the demo decoder takes 6 to 13 % less time with 2 at once
# than with 8, for the same bits.
CPU_DECODE_BATCH = 2


class PictureMaker(Protocol):
    """A text-to-image model under evaluation: text encoder, denoiser, decoder."""

    @property
    def denoiser(self) -> Denoiser:
        """The backbone with its roles "teacher" and "student"."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the latents."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        ...

    @property
    def stochasticity(self) -> Mapping[int, float]:
        """{step count: share of fresh noise between the student's steps}; empty = 1."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of B prompts."""
        ...

    def unconditional(self, batch: int) -> Conditioning:
        """Return the unconditional conditioning of guidance, ``batch`` times."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]."""
        ...


@dataclass(frozen=True)
class SamplingSetting:
    """One way to make pictures.

    Attributes:
        role: who predicts.
        steps: at least 1.
        guidance: w in ``uncond + w (cond - uncond)``; 1 = no guidance.
        interval: lowest and highest uniform time, in 0..999, at which there is guidance; None = everywhere.
    """

    role: Literal["teacher", "student"]
    steps: int
    guidance: float = 1.0
    interval: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """``teacher 4 steps, guided``: the name in tables and reports."""
        return f"{self.role} {self.steps} step{'s' * (self.steps > 1)}{', guided' * (self.guidance != 1)}"

    @property
    def label(self) -> str:
        """``teacher 25 steps, guidance 7.5``: the name where runs with several scales stand side by side."""
        return f"{self.role} {self.steps} step{'s' * (self.steps > 1)}" + (
            f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        )

    @property
    def nfe(self) -> int:
        """Forward passes of the network per picture: one a step, or two where the step is guided."""
        return self.steps + sum(self.guides(1 - step / self.steps) for step in range(self.steps))

    def guides(self, fraction: float) -> bool:
        """Return whether there is guidance at a share of the process's whole time: 1 is pure noise."""
        from ...flash_core.passes.guidance import within

        return self.guidance != 1 and within(self.interval, fraction)


def distinct(runs: Iterable[SamplingSetting]) -> list[SamplingSetting]:
    """Return the runs without those that share the name of an earlier one.

    A reference of 4 steps, guided in an interval, stands in the place of the undistilled teacher's 4 guided steps.
    """
    found: dict[str, SamplingSetting] = {}
    for run in runs:
        found.setdefault(run.name, run)
    return list(found.values())


@dataclass(frozen=True)
class EncodedPrompts:
    """A :class:`PictureMaker` with prompts that were encoded before the text encoders were freed.

    Attributes:
        conditioning: of all the prompts, with the conditions of the task.
    """

    teacher: Teacher
    task: Task
    prompts: tuple[str, ...]
    conditioning: Conditioning

    @property
    def denoiser(self) -> DiffusersDenoiser:
        """The backbone."""
        return self.teacher.denoiser

    @property
    def device(self) -> torch.device:
        """The device of the latents."""
        return self.teacher.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return self.teacher.latent_shape

    @property
    def stochasticity(self) -> Mapping[int, float]:
        """{step count: share of fresh noise between the student's steps}."""
        return self.teacher.stochasticity

    def unconditional(self, batch: int) -> Conditioning:
        """Return the unconditional conditioning of all the prompts."""
        assert batch == len(self.prompts)
        return self.task.unconditional(self.conditioning, self.teacher.unconditional(batch))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]."""
        return self.teacher.decode(latents)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Return the conditioning of all the prompts; no other prompts can be asked for."""
        assert tuple(prompts) == self.prompts
        return self.conditioning

    def part(self, first: int, count: int) -> EncodedPrompts:
        """Return at most ``count`` prompts from position ``first`` on."""
        import torch

        prompts = self.prompts[first : first + count]
        index = torch.arange(first, first + len(prompts))
        return replace(self, prompts=prompts, conditioning=self.conditioning.rows(index))


def share_of_fresh_noise(maker: PictureMaker, steps: int) -> float:
    """Return the stochasticity of the student's sampler at a step count; one that is not listed takes the nearest."""
    from ...flash_core.lora import nearest_stochasticity

    return nearest_stochasticity(maker.stochasticity, steps)[0]


def sampler_facts(maker: PictureMaker, step_counts: Sequence[int], solver: Solver | None) -> dict[str, Any]:
    """Return how pictures are sampled, for the report: the teacher's solver, the student's stochasticity by steps."""
    return {
        "solver": solver or default_solver(maker.denoiser.process),
        "stochasticity": {str(steps): share_of_fresh_noise(maker, steps) for steps in step_counts if steps > 1},
    }


def sampler_note(maker: PictureMaker, step_counts: Sequence[int]) -> list[str]:
    """Return a sentence on the student's sampler, unless it adds only fresh noise, as the paper does."""
    shares = {steps: share_of_fresh_noise(maker, steps) for steps in step_counts if steps > 1}
    if all(share == 1 for share in shares.values()):
        return []
    told = ", ".join(f"{share:g} at {steps} steps" for steps, share in shares.items())
    return [f"Stochasticity of the student's sampler: {told} (1 = fresh noise at every step, 0 = deterministic)."]


def interval_note(run: SamplingSetting) -> list[str]:
    """Return a sentence on where the reference is guided, unless it is guided everywhere."""
    if run.interval is None or run.guidance == 1:
        return []
    low, high = run.interval
    return [f"The teacher's {run.steps} steps are guided at noise levels {low} to {high} of 0 to 999, as in training."]


def default_solver(process: Process) -> Solver:
    """Return Euler for flow models, DPM-Solver++(2M) for others, as in training."""
    return "euler" if process.prediction == "flow" else "dpmpp_2m"


def noise_source(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Callable[[], Tensor]:
    """Return a function that draws noise (B, *shape), with one generator per sample.

    Noise is drawn on the CPU, so a seed gives the same noise on every device. The CPU's generator reads only the low
    32 bits of a seed.
    """
    import torch

    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(*shape, generator=stream) for stream in streams]).to(device)


def sample_latents(
    maker: PictureMaker,
    setting: SamplingSetting,
    prompts: Sequence[str],
    seeds: Sequence[int],
    solver: Solver | None = None,
) -> Tensor:
    """Sample latents (B, C, h, w) for B prompts, from pure noise.

    The student uses the few-step sampler (fresh noise after each prediction). The teacher solves its ODE. For one seed
    both start from the same noise.

    Args:
        solver: the teacher's; default :func:`default_solver`.
    """
    import torch

    from ...flash_core.denoiser import guided_z0, predict_z0
    from ...flash_core.grid import trailing_timesteps
    from ...flash_core.sampler import few_step_sample
    from ...flash_core.solvers import solve

    denoiser = maker.denoiser
    process = denoiser.process
    timesteps = trailing_timesteps(process, setting.steps)
    noise = noise_source(seeds, maker.latent_shape, maker.device)
    conditioning = maker.encode_prompts(prompts)
    unconditional = None if setting.guidance == 1 else maker.unconditional(len(prompts))

    def z0(z: Tensor, t: Tensor) -> Tensor:
        # All samples of a batch are at one timestep.
        if unconditional is None or not setting.guides(process.fraction(float(t[0]))):
            return predict_z0(denoiser, z, t, conditioning)
        guidance = torch.full((len(z),), setting.guidance, device=z.device)
        return guided_z0(denoiser, z, t, conditioning, unconditional, guidance)

    with torch.inference_mode(), denoiser.role(setting.role):
        if setting.role == "teacher":
            # All samples start at the first timestep, so the solver always asks for the whole batch.
            return solve(
                lambda z, t, _: z0(z, t), process, noise(), timesteps, solver=solver or default_solver(process)
            )
        alphas, sigmas = process.alpha_sigma(torch.tensor(timesteps, dtype=torch.float64))
        return few_step_sample(
            lambda z, index: z0(z, torch.full((len(z),), timesteps[index], device=z.device)),
            noise(),
            alphas.tolist(),
            sigmas.tolist(),
            noise,
            stochasticity=share_of_fresh_noise(maker, setting.steps),
        )


def sweep_latents(
    maker: PictureMaker,
    sweep: Sequence[tuple[int, float]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Sample the student's latents (B, C, h, w) for each (step count, stochasticity), all from the same noise.

    The first prediction depends on the noise and its timestep alone, so all runs that begin at one timestep share it:
    see :func:`sweep_passes`.

    Args:
        advance: gets B after each pass.
    """
    import torch

    from ...flash_core.denoiser import predict_z0
    from ...flash_core.grid import trailing_timesteps
    from ...flash_core.sampler import few_step_sample

    denoiser = maker.denoiser
    conditioning = maker.encode_prompts(prompts)
    first: dict[float, Tensor] = {}

    def run(steps: int, stochasticity: float) -> Tensor:
        timesteps = trailing_timesteps(denoiser.process, steps)
        noise = noise_source(seeds, maker.latent_shape, maker.device)

        def z0(z: Tensor, index: int) -> Tensor:
            t = timesteps[index]
            if index == 0 and t in first:
                return first[t]
            prediction = predict_z0(denoiser, z, torch.full((len(z),), t, device=z.device), conditioning)
            if advance is not None:
                advance(len(z))
            return first.setdefault(t, prediction) if index == 0 else prediction

        alphas, sigmas = denoiser.process.alpha_sigma(torch.tensor(timesteps, dtype=torch.float64))
        return few_step_sample(z0, noise(), alphas.tolist(), sigmas.tolist(), noise, stochasticity=stochasticity)

    with torch.inference_mode(), denoiser.role("student"):
        return [run(steps, stochasticity) for steps, stochasticity in sweep]


def sweep_passes(sweep: Sequence[tuple[int, float]]) -> int:
    """Return the forward passes per picture of :func:`sweep_latents` on trailing grids, which begin at one timestep."""
    return 1 + sum(steps - 1 for steps, _ in sweep)


def decode_pictures(maker: PictureMaker, latents: Tensor) -> Tensor:
    """Decode latents to pictures (B, 3, H, W) in [0, 1], on the CPU.

    Raises:
        UserError: a picture holds NaN or infinity.
    """
    import torch

    size = CPU_DECODE_BATCH if latents.device.type == "cpu" else len(latents)
    with torch.inference_mode():
        images = torch.cat([maker.decode(part) for part in latents.split(size)])
        if not bool(images.isfinite().all()):
            raise UserError(
                "the model made NaN or infinity instead of a picture; the LoRA has diverged, or the guidance is too "
                "strong, or fp16 overflows: use another LoRA, a lower --guidance, --precision bf16 or no"
            )
        return (images.float() / 2 + 0.5).clamp(0, 1).cpu()
