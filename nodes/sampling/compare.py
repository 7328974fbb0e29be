"""Flash Compare: the teacher at many steps beside Flash at few, with the same prompt and noise; time and cost."""

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
from ...flash_core.presets import in_words
from ..shared.inputs import AUTO, check_guidance, check_unconditional, fixed_latent, seed_input
from ..shared.model_facts import METADATA_KEY, check_makes_pictures, check_vae, describe_model
from ..shared.prompts import check_channels, check_prompts
from ..shared.schema import count, node_schema, show_text
from .contact_sheet import draw_grid
from .few_step import flash_grid, flash_sampler, grid_transitions, in_table, listed
from .presets import choose_preset

COUNTER_KEY = "flash_compare"
FLASH_GUIDANCE = 1.0


class FlashCompare(io.ComfyNode):
    """Compare the teacher with its few-step model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="sampling",
            node_id="FlashCompare",
            display_name="Flash Compare",
            search_aliases=["compare models", "xy plot", "grid", "benchmark", "nfe", "flash diffusion"],
            description="Compare the teacher at many steps with Flash at few: a labelled grid, evaluations and "
            "seconds.",
            inputs=[
                io.Model.Input("model", tooltip="The teacher: the model without its Flash LoRA."),
                io.Model.Input("flash_model", tooltip="The same model with its Flash LoRA."),
                io.Conditioning.Input("positive", tooltip="The prompt for both models."),
                io.Vae.Input("vae", tooltip="The models' VAE."),
                io.Latent.Input("latent_image", tooltip="An empty latent: the size and the number of pictures."),
                seed_input("All runs start from the same noise: that of KSampler at this seed."),
                io.Int.Input("teacher_steps", default=30, min=1, max=1000, tooltip="The teacher's step count."),
                io.Float.Input(
                    "teacher_guidance",
                    default=7.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="The teacher's classifier-free guidance (KSampler's cfg). Above 1 it needs a negative "
                    "prompt, and each step costs two evaluations.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="dpmpp_2m",
                    tooltip="The teacher's sampler. Flash uses its own.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="The teacher's noise schedule. Flash uses its trained timesteps.",
                ),
                io.String.Input(
                    "flash_steps",
                    default="1, 2, 4",
                    tooltip=f"Flash's step counts (1 to {MAX_FEW_STEPS}), separated by commas. Each gets a column.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the teacher should avoid; the text may be empty. Needed above guidance 1.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="grid", tooltip="One column for each run, one row for each picture of the batch."
                ),
                io.String.Output(display_name="table", tooltip="The figures as a Markdown table, with notes."),
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
        """Sample all runs, then decode: so the VAE takes no memory while a run is timed."""
        counts = parse_steps(flash_steps)
        check_models(model, flash_model)
        check_vae(vae, model)
        check_guidance(teacher_guidance, negative, name="teacher_guidance")
        for one in (model, flash_model):
            check_unconditional(one, negative)
        check_prompts(model, positive=positive, negative=negative)
        samples = fixed_latent(model, latent_image)
        check_channels(model, samples.shape, positive=positive, negative=negative)
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
        name: of the model: "teacher" or "Flash".
        steps: step count.
        sampler: the sampler, or the timesteps.
        guidance: classifier-free guidance; 1 is off.
        evaluations: of the network, for each picture.
        seconds: to sample the whole batch.
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
        """One line for the node's face."""
        return f"{self.name}, {count(self.steps, 'step')}: {self.evaluations:g} NFE, {self.seconds:.2f} s"

    def label(self) -> str:
        """Two or three short lines for the grid."""
        title = f"{self.name}, {count(self.steps, 'step')}"
        guided = f"\nguidance {self.guidance:g}" if self.guidance != FLASH_GUIDANCE else ""
        return f"{title}{guided}\n{self.evaluations:g} NFE, {self.seconds:.2f} s"


class Progress:
    """One progress bar over all runs, with previews."""

    def __init__(self, model: ModelPatcher, total: int) -> None:
        import latent_preview  # ComfyUI's; not importable before its server has started

        self.preview = latent_preview.prepare_callback(model, total)
        self.total = total
        self.done = 0

    def run(self, steps: int) -> Callable[[int, Tensor, Tensor, int], None]:
        """Make ComfyUI's callback for the next ``steps`` units of the bar; some schedulers call it once more."""
        start, self.done = self.done, self.done + steps

        def step(index: int, z0: Tensor, z: Tensor, _: int) -> None:
            self.preview(min(start + index, start + steps - 1), z0, z, self.total)

        return step


@dataclass(frozen=True)
class Bench:
    """The settings that all runs share.

    Attributes:
        positive, negative: the prompts.
        latent, noise: (B, C, h, w).
        mask: 1 where to sample; None for everywhere.
        seed: of all noise.
        progress: the bar.
    """

    positive: list[Any]
    negative: list[Any]
    latent: Tensor
    noise: Tensor
    mask: Tensor | None
    seed: int
    progress: Progress

    def warm_up(self, model: ModelPatcher, guidance: float) -> None:
        """Run one evaluation that is not timed: it loads weights, patches the LoRA in and selects kernels."""
        self._custom(model, flash_grid(model, 1).sigmas, guidance)

    def teacher(self, model: ModelPatcher, steps: int, guidance: float, sampler_name: str, scheduler: str) -> Run:
        """Sample with ComfyUI's KSampler."""
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
        """Sample as Flash Sampler does, without guidance."""
        counted = Counted(model)
        chosen = flash_grid(model, steps)
        latents, seconds = timed(model.load_device, lambda: self._custom(counted.model, chosen.sigmas, FLASH_GUIDANCE))
        fresh = grid_transitions(model, chosen)
        sampler = f"t = {listed(chosen.timesteps)}" + in_table(chosen, fresh)
        return Run("Flash", steps, sampler, FLASH_GUIDANCE, counted.rows / len(self.latent), seconds, latents)

    def _custom(self, model: ModelPatcher, sigmas: Tensor, guidance: float) -> Tensor:
        latents: Tensor = comfy.sample.sample_custom(
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
        return latents

    def _shared(self, steps: int) -> dict[str, Any]:
        return {
            "noise_mask": self.mask,
            "callback": self.progress.run(steps),
            "disable_pbar": not comfy.utils.PROGRESS_BAR_ENABLED,
            "seed": self.seed,
        }


class Counted:
    """A clone of a model that counts the network's evaluations.

    Attributes:
        rows: pictures that the network has evaluated; guidance evaluates each picture twice, in one or two calls.
        model: the clone.
    """

    def __init__(self, model: ModelPatcher) -> None:
        self.rows = 0
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COUNTER_KEY, self._count)

    def _count(self, executor: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        self.rows += len(x)
        output: Tensor = executor(x, *arguments, **named)
        return output


def timed(device: torch.device, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return the result of ``work``, and the seconds until the device has finished it."""
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return result, time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all queued work; a CPU has no queue."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait()


def parse_steps(text: str) -> list[int]:
    """Read a user's list of step counts, without repetitions.

    Raises:
        ValueError: the list is empty, or a number is not in 1..8.
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
        raise ValueError("flash_steps is empty. Write step counts separated by commas, such as 1, 2, 4.")
    return counts


def check_models(model: ModelPatcher, flash_model: ModelPatcher, node: str = "Flash Compare", **pictures: bool) -> None:
    """Raise ValueError where the models cannot share a prompt and a latent, or do not make pictures.

    Args:
        node: name of the node that asks. Default: Flash Compare.
        pictures: see :func:`~..shared.model_facts.check_makes_pictures`.
    """
    families = [describe_model(one) for one in (model, flash_model)]
    channels = [one.model.model_config.unet_config.get("in_channels") for one in (model, flash_model)]
    if channels[0] != channels[1]:
        families = [f"{family}, {number} input channels" for family, number in zip(families, channels, strict=True)]
    if type(model.model) is not type(flash_model.model) or families[0] != families[1]:
        raise ValueError(
            f"The models are of different families: 'model' is {families[0]}, 'flash_model' is {families[1]}. Connect "
            "one checkpoint to 'model', and the same checkpoint through Flash LoRA Loader to 'flash_model'."
        )
    check_makes_pictures(model, node, **pictures)


def notes(model: ModelPatcher, flash_model: ModelPatcher, seed: int) -> list[str]:
    """Notes under the table on the seed and the two models."""
    return [f"All runs start from the same noise (seed {seed}).", *model_notes(model, flash_model)]


def model_notes(model: ModelPatcher, flash_model: ModelPatcher) -> list[str]:
    """Notes on two models that are no teacher and few-step model, or on a LoRA that is made for guidance."""
    found = []
    if model.is_clone(flash_model) and model.patches_uuid == flash_model.patches_uuid:
        found.append(
            "NOTE: 'model' and 'flash_model' are the same model, so this table compares only samplers. Put Flash LoRA "
            "Loader before 'flash_model'."
        )
    recognised = choose_preset(flash_model, AUTO)
    if recognised is not None and recognised.preset.guidance[0] > FLASH_GUIDANCE:
        found.append(
            f"NOTE: {recognised.preset.title} is made for guidance {in_words(recognised.preset.guidance)}; here it "
            "runs without guidance."
        )
    brought = model.get_attachment(METADATA_KEY)
    if brought is not None:
        found.append(f"NOTE: 'model' contains the Flash LoRA {brought.title!r}, so it is not the teacher.")
    return found


def table(runs: Sequence[Run], pictures: Tensor, model: ModelPatcher, remarks: Sequence[str]) -> str:
    """Write the figures as a Markdown table.

    Args:
        runs: the teacher's first.
        pictures: (B, H, W, 3), of any run.
        model: for its family, data type and device.
        remarks: lines below the table.
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
            "Seconds: to sample all pictures, after one warm-up evaluation of each model. Text encoder, VAE and "
            "loading are not included.",
            "NFE: evaluations of the network for each picture. Guidance w is uncond + w (cond - uncond) and costs two "
            "evaluations a step; 1 is off.",
            *remarks,
        ]
    )
