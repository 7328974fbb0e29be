"""Compare: one prompt, one noise, the teacher at many steps with guidance beside Flash at few; time and cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sd import VAE
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.grid import MAX_FEW_STEPS
from ..shared.inputs import check_guidance, fixed_latent, seed_input
from ..shared.model_facts import METADATA_KEY, check_makes_pictures, check_prompts, check_vae, describe_model
from ..shared.schema import count, node_schema, show_text
from .contact_sheet import draw_grid
from .few_step import flash_grid, flash_sampler, listed

COUNTER_KEY = "flash_compare"
FLASH_GUIDANCE = 1.0


class FlashCompare(io.ComfyNode):
    """The teacher beside its few-step model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            node_id="FlashCompare",
            display_name="Flash Compare",
            search_aliases=["compare models", "xy plot", "grid", "benchmark", "nfe", "flash diffusion"],
            description="The teacher at many steps beside Flash at few: a labelled grid, evaluations and seconds.",
            inputs=[
                io.Model.Input("model", tooltip="The teacher: the model without its Flash LoRA."),
                io.Model.Input("flash_model", tooltip="The same model with its Flash LoRA."),
                io.Conditioning.Input("positive", tooltip="What to show; for both."),
                io.Vae.Input("vae", tooltip="The models' VAE."),
                io.Latent.Input("latent_image", tooltip="An empty latent: the pictures' size and how many a row."),
                seed_input("All runs start from the same noise, KSampler's at this seed."),
                io.Int.Input("teacher_steps", default=30, min=1, max=1000, tooltip="The teacher's steps."),
                io.Float.Input(
                    "teacher_guidance",
                    default=7.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The teacher's classifier-free guidance (KSampler's cfg). Above 1 a negative prompt must "
                    "be connected, and each step costs two evaluations.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="dpmpp_2m",
                    tooltip="The teacher's sampler; Flash has its own.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="The teacher's noise levels; Flash has its own.",
                ),
                io.String.Input(
                    "flash_steps",
                    default="1, 2, 4",
                    tooltip=f"Flash's step counts, 1 to {MAX_FEW_STEPS}, separated by commas: a column each.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What the teacher's guidance avoids; its text may be empty."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="grid", tooltip="A column a run, a row a picture of the batch, labelled above."
                ),
                io.String.Output(display_name="table", tooltip="The same figures as a Markdown table, with notes."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        flash_model: ModelPatcher,
        positive: list[Any],
        vae: VAE,
        latent_image: dict[str, Any],
        seed: int,
        teacher_steps: int,
        teacher_guidance: float,
        sampler_name: str,
        scheduler: str,
        flash_steps: str,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Sample all, then decode all, so that the VAE takes no memory from a run that is timed."""
        counts = parse_steps(flash_steps)
        check_models(model, flash_model)
        check_vae(vae, model)
        check_guidance(teacher_guidance, negative, name="teacher_guidance")
        check_prompts(model, positive=positive, negative=negative)
        samples = fixed_latent(model, latent_image)
        bench = Bench(
            positive=positive,
            negative=positive if negative is None else negative,  # at guidance 1 it is not evaluated
            latent=samples,
            noise=comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index")),
            mask=latent_image.get("noise_mask"),
            seed=seed,
            progress=Progress(model, teacher_steps + sum(counts) + 2),
        )
        bench.warm_up(model, teacher_guidance)
        runs = [bench.teacher(model, teacher_steps, teacher_guidance, sampler_name, scheduler)]
        bench.warm_up(flash_model, FLASH_GUIDANCE)
        runs += [bench.flash(flash_model, steps) for steps in counts]
        pictures = [vae.decode(run.latents)[..., :3] for run in runs]
        show_text(cls, "\n".join(run.short() for run in runs))
        grid = draw_grid(pictures, [run.label() for run in runs])
        return io.NodeOutput(grid, table(runs, pictures[0], model, notes(model, flash_model, seed)))


@dataclass(frozen=True)
class Run:
    """One column.

    Attributes:
        name: whose it is.
        sampler: the sampler, or the timesteps.
        evaluations: of the network, for each picture.
        seconds: of the sampling of the whole batch.
        latents: (B, C, h, w).
    """

    name: str
    steps: int
    sampler: str
    guidance: float
    evaluations: float
    seconds: float
    latents: Tensor

    def short(self) -> str:
        """A line."""
        return f"{self.name}, {count(self.steps, 'step')}: {self.evaluations:g} NFE, {self.seconds:.2f} s"

    def label(self) -> str:
        """A few short lines."""
        title = f"{self.name}, {count(self.steps, 'step')}"
        guided = f"\nguidance {self.guidance:g}" if self.guidance != FLASH_GUIDANCE else ""
        return f"{title}{guided}\n{self.evaluations:g} NFE, {self.seconds:.2f} s"


class Progress:
    """One bar over all runs, with previews."""

    def __init__(self, model: ModelPatcher, total: int) -> None:
        import latent_preview  # ComfyUI's; not importable before its server has started

        self.preview = latent_preview.prepare_callback(model, total)
        self.total = total
        self.done = 0

    def run(self, steps: int) -> Callable[[int, Tensor, Tensor, int], None]:
        """ComfyUI's callback for the next ``steps`` of the bar; some schedulers take one more."""
        start, self.done = self.done, self.done + steps

        def step(index: int, z0: Tensor, z: Tensor, _: int) -> None:
            self.preview(min(start + index, start + steps - 1), z0, z, self.total)

        return step


@dataclass(frozen=True)
class Bench:
    """What all runs have in common.

    Attributes:
        latent, noise: (B, C, h, w).
        mask: where to sample, or None for everywhere.
    """

    positive: list[Any]
    negative: list[Any]
    latent: Tensor
    noise: Tensor
    mask: Tensor | None
    seed: int
    progress: Progress

    def warm_up(self, model: ModelPatcher, guidance: float) -> None:
        """One evaluation, not timed: it loads the weights, patches the LoRA in and lets kernels be chosen."""
        self._custom(model, flash_grid(model, 1).sigmas, guidance)

    def teacher(self, model: ModelPatcher, steps: int, guidance: float, sampler_name: str, scheduler: str) -> Run:
        """ComfyUI's KSampler."""
        counted = Counted(model)
        latents, seconds = timed(
            model.load_device,
            lambda: comfy.sample.sample(
                counted.model,
                self.noise,
                steps,
                guidance,
                sampler_name,
                scheduler,
                self.positive,
                self.negative,
                self.latent,
                **self._shared(steps),
            ),
        )
        evaluations = counted.rows / len(self.latent)
        return Run("teacher", steps, f"{sampler_name}, {scheduler}", guidance, evaluations, seconds, latents)

    def flash(self, model: ModelPatcher, steps: int) -> Run:
        """Flash Sampler, without guidance."""
        counted = Counted(model)
        chosen = flash_grid(model, steps)
        latents, seconds = timed(model.load_device, lambda: self._custom(counted.model, chosen.sigmas, FLASH_GUIDANCE))
        sampler = f"t = {listed(chosen.timesteps)}"
        return Run("Flash", steps, sampler, FLASH_GUIDANCE, counted.rows / len(self.latent), seconds, latents)

    def _custom(self, model: ModelPatcher, sigmas: Tensor, guidance: float) -> Tensor:
        return comfy.sample.sample_custom(
            model,
            self.noise,
            guidance,
            flash_sampler(),
            sigmas,
            self.positive,
            self.negative,
            self.latent,
            **self._shared(len(sigmas) - 1),
        )

    def _shared(self, steps: int) -> dict[str, Any]:
        return {
            "noise_mask": self.mask,
            "callback": self.progress.run(steps),
            "disable_pbar": not comfy.utils.PROGRESS_BAR_ENABLED,
            "seed": self.seed,
        }


class Counted:
    """A clone of a model that counts what the network is asked.

    Attributes:
        rows: pictures that went through the network: guidance sends each twice, in one call or in two.
    """

    def __init__(self, model: ModelPatcher) -> None:
        self.rows = 0
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COUNTER_KEY, self._count)

    def _count(self, executor: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.rows += len(x)
        return executor(x, *arguments, **named)


def timed(device: torch.device, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What ``work`` returns, and its seconds until the device is done with it."""
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device's queue; a CPU has none."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait()


def parse_steps(text: str) -> list[int]:
    """Step counts as the user lists them, each once.

    Raises:
        ValueError: none, or one that is not in 1..8.
    """
    counts: list[int] = []
    for word in text.replace(";", ",").split(","):
        if not word.strip():
            continue
        if not word.strip().isdecimal() or not 1 <= int(word) <= MAX_FEW_STEPS:
            raise ValueError(
                f"flash_steps lists {word.strip()!r}; expected whole numbers of 1 to {MAX_FEW_STEPS}, separated by "
                "commas, such as 1, 2, 4."
            )
        if int(word) not in counts:
            counts.append(int(word))
    if not counts:
        raise ValueError("flash_steps is empty; list step counts separated by commas, such as 1, 2, 4.")
    return counts


def check_models(model: ModelPatcher, flash_model: ModelPatcher) -> None:
    """Raise ValueError where the two can't share a prompt and a latent, or make no pictures."""
    families = [describe_model(one) for one in (model, flash_model)]
    channels = [one.model.model_config.unet_config.get("in_channels") for one in (model, flash_model)]
    if channels[0] != channels[1]:
        families = [f"{family}, {number} input channels" for family, number in zip(families, channels, strict=True)]
    if type(model.model) is not type(flash_model.model) or families[0] != families[1]:
        raise ValueError(
            f"The models are of different families: 'model' is {families[0]}, 'flash_model' is {families[1]}. Connect "
            "one checkpoint to both, to 'flash_model' through Flash LoRA Loader."
        )
    check_makes_pictures(model, "Flash Compare")


def notes(model: ModelPatcher, flash_model: ModelPatcher, seed: int) -> list[str]:
    """What the reader of the table should know of its two models."""
    found = [f"All runs start from the same noise (seed {seed})."]
    if model.is_clone(flash_model) and model.patches_uuid == flash_model.patches_uuid:
        found.append(
            "NOTE: 'model' and 'flash_model' are the same, without a LoRA between them: this compares samplers only. "
            "Put Flash LoRA Loader before 'flash_model'."
        )
    brought = model.get_attachment(METADATA_KEY)
    if brought is not None:
        found.append(f"NOTE: 'model' has the Flash LoRA {brought.title!r} in it, so it is no teacher.")
    return found


def table(runs: Sequence[Run], pictures: Tensor, model: ModelPatcher, remarks: Sequence[str]) -> str:
    """The figures in Markdown.

    Args:
        pictures: (B, H, W, 3), of any run.
    """
    slowest = runs[0].seconds
    lines = [
        "| | steps | sampler | guidance | NFE | seconds | speed-up |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {run.name} | {run.steps} | {run.sampler} | {run.guidance:g} | {run.evaluations:g} | {run.seconds:.2f} | "
        f"{slowest / max(run.seconds, 1e-9):.1f}x |"
        for run in runs
    ]
    batch, height, width = pictures.shape[:3]
    device = comfy.model_management.get_torch_device_name(model.load_device)
    weights = str(model.model_dtype()).removeprefix("torch.")
    return "\n".join(
        [
            *lines,
            "",
            f"{describe_model(model)}, {count(batch, 'picture')} of {width} x {height} pixels, {weights}, on {device}.",
            "Seconds: sampling all pictures, after one evaluation of each model to warm up; without text encoder, VAE "
            "and loading.",
            "NFE: evaluations of the network for each picture. Guidance w is uncond + w (cond - uncond), two "
            "evaluations a step; 1 is none.",
            *remarks,
        ]
    )
