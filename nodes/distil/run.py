"""A distillation of a MODEL inside ComfyUI: what the node does, between its inputs and its outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...flash_core.families import name_of
from ...flash_core.grid import MAX_FEW_STEPS, trailing_timesteps
from ...flash_core.lora import FlashMetadata, LoraFile, read_lora, write_lora
from ..shared.model_facts import model_base
from ..shared.schema import count
from ..shared.sizes import PIXELS
from .denoiser import ModelDenoiser
from .training.examples import Examples
from .training.fingerprint import Fingerprint
from .training.loop import Progress, Training
from .training.pictures import BAND, SAMPLES, STEPS, Bench, Decode, as_image, report_picture
from .training.settings import DistilSettings
from .training.state import RunFolder, safe_name, unfinished

PREVIEW_SIDE = 768  # pixels, at most, of the live preview
SHOW_SECONDS = 1.0  # between two texts on the node's face
BEST_STEPS = 4
OTHER_INPUTS = (
    "NOTE: an unfinished run of this name lies in {}. It had other inputs, so this run began anew. Give it the same "
    "inputs to go on with it, or delete the folder."
)
NATIVE_COMPONENT = "diffusion_model"  # of keys with ComfyUI's own names, which its loader takes for every family
BEFORE = "errors before"  # the note with the figures of the model without the LoRA


@dataclass(frozen=True)
class Request:
    """What to distil, how, and where the run's folder goes.

    Attributes:
        model: the teacher.
        positive, negative: CONDITIONING, one sample each entry, and one for guidance's other branch.
        latents: (N, C, h, w) as ComfyUI's LATENT holds them; None for the teacher's own trajectories.
        shape: (C, h, w) of a latent.
        vae: decodes the pictures; None for small pictures by ComfyUI's linear map from latents to colours.
        settings: of the training.
        name: of the run.
        output: the folder of all runs.
        preview_every: updates between two previews; 0 for none.
        checkpointing: whether activations are computed again in the backward pass; the result is the same up to
            rounding.
    """

    model: ModelPatcher
    positive: list[Any]
    negative: list[Any]
    latents: Tensor | None
    shape: tuple[int, ...]
    vae: VAE | None
    settings: DistilSettings
    name: str
    output: Path
    preview_every: int
    checkpointing: bool = False


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        file: the LoRA.
        path: the LoRA's file in the run's folder.
        picture: (1, H, W, 3) the report's picture.
        text: the report.
        losses: of each update.
    """

    file: LoraFile
    path: Path
    picture: Tensor
    text: str
    losses: list[float]


def distil(
    request: Request, tell: Callable[[str], None], plot: Callable[[Sequence[float], int], None] = lambda *_: None
) -> Result:
    """Distil a MODEL, from the start or from where its folder says that the run is.

    Args:
        tell: shows a text on the node's face.
        plot: shows the losses of all updates so far there, and takes the number of updates of the whole run. Default:
            do nothing.

    Raises:
        ValueError: the model or the conditions cannot be distilled, a state is damaged, or training diverged.
        InterruptProcessingException: ComfyUI's, after the state was saved.
    """
    settings = request.settings
    with ModelDenoiser(request.model, checkpointing=request.checkpointing) as denoiser:
        examples = read_examples(denoiser, request)
        of_model = fingerprint_of_model(denoiser)
        identity = Fingerprint().add((of_model, settings, examples))
        folder = RunFolder(request.output / f"{safe_name(request.name)}-{identity.text()}")
        face = Face(request, denoiser, tell, plot)
        training = Training(denoiser, settings, examples, folder, face.observe)
        started_at = training.update
        others = [] if started_at else unfinished(request.output, request.name, folder.path)
        bench = Bench(training.distiller, examples, settings.guidance, settings.seed, settings.at_once)
        face.start(training, bench)
        if BEFORE not in training.notes:
            training.notes[BEFORE] = list(bench.errors().values())
        try:
            training.run()
        except BaseException:
            tell(f"stopped at update {training.update} of {settings.budget.updates}; what is learnt is kept")
            raise
        with training.average.applied():
            modules = denoiser.adapter("student")
            after = list(bench.errors().values())
            picture = report_picture(bench, face.decode, training.losses)
        metadata = metadata_of(request, denoiser, training, of_model)
        transformer = not hasattr(request.model.model.diffusion_model, "input_blocks")  # which UNets have
        component = NATIVE_COMPONENT if denoiser.names_are_native else None
        write_lora(folder.lora, modules, metadata, transformer=transformer, component=component)
    text = report_text(request, training, started_at, folder, training.notes[BEFORE], after)
    text += "".join(f"\n\n{OTHER_INPUTS.format(other)}" for other in others)
    return Result(read_lora(folder.lora, mapped=False), folder.lora, picture, text, training.losses)


def read_examples(denoiser: ModelDenoiser, request: Request) -> Examples:
    """Return the conditions and the latents on the model's device.

    Raises:
        ValueError: the conditions cannot be distilled, or there are neither as many prompts as latents nor one.
    """
    latents = None if request.latents is None else denoiser.latents(request.latents)
    conditions, unconditional = denoiser.conditions(request.positive, request.negative, request.shape)
    if len(unconditional) != 1:
        raise ValueError(
            f"The negative prompt holds {len(unconditional)} conditions; expected 1, for all prompts. Connect one CLIP "
            "Text Encode to 'negative'."
        )
    if latents is not None and len(conditions) not in (1, len(latents)):
        raise ValueError(
            f"There are {len(conditions)} prompts for {count(len(latents), 'latent')}; expected 1 prompt for all, or "
            "one for each latent, in their order."
        )
    return Examples(conditions, unconditional, latents, request.shape, denoiser.device)


def fingerprint_of_model(denoiser: ModelDenoiser) -> str:
    """Return a fingerprint of the weights as they are now, merges and LoRAs included, and of the model's patches."""
    model = denoiser.patcher
    patches = (model.model_options, model.object_patches, getattr(model, "wrappers", {}))
    return Fingerprint().add_weights(model.model.diffusion_model).add((denoiser.process, patches)).full()


def metadata_of(request: Request, denoiser: ModelDenoiser, training: Training, of_model: str) -> FlashMetadata:
    """Return the LoRA's metadata, from which Flash Sampler sets itself up."""
    process, settings = denoiser.process, request.settings
    base = model_base(request.model) or type(request.model.model).__name__
    return FlashMetadata(
        base=base,
        prediction=process.prediction,
        process=process.kind,
        timesteps={steps: tuple(trailing_timesteps(process, steps)) for steps in range(1, MAX_FEW_STEPS + 1)},
        steps=BEST_STEPS,
        stochasticity=settings.stochasticity_by_steps(),
        title=f"{request.name}, Flash LoRA of {name_of(base)}",
        teacher=name_of(base),
        training={
            "updates": str(training.update),
            "samples": str(training.position),
            "trainer": "Flash Distill in ComfyUI",
            "model_fingerprint": of_model,
            "guidance": f"{settings.guidance:g}",
            "rank": str(settings.rank),
            "learning_rate": f"{settings.learning_rate:g}",
            "prompts": str(len(training.examples.conditions)),
        },
    )


def report_text(
    request: Request, training: Training, started_at: int, folder: RunFolder, before: list[float], after: list[float]
) -> str:
    """Return the report in words and figures."""
    settings, losses = request.settings, training.losses
    band = max(1, min(BAND, len(losses) // 3))
    height, width = request.shape[1:]
    source = f"{settings.budget.trajectories} recorded solutions of the teacher" if settings.replays else "your latents"
    last = f", the last of them with {settings.last_terms} on the first step" if len(settings.stages()) > 1 else ""
    lines = [
        f"{request.name}: {count(training.update, 'update')} of {settings.at_once * settings.batches} samples{last}",
        f"from {source}, {count(len(training.examples.conditions), 'prompt')}, latents of {width} x {height}",
        f"teacher: {settings.teacher_steps} steps at guidance {settings.guidance:g}; LoRA: rank {settings.rank}, "
        f"learning rate {settings.learning_rate:g}, seed {settings.seed}",
        f"distillation loss: {mean(losses[:band]):.4g} -> {mean(losses[-band:]):.4g} (means of the first and the last "
        f"{count(band, 'update')})",
        f"time: {in_minutes(training.seconds)}" + (f"; resumed at update {started_at}" if started_at else ""),
        f"state: {folder.path}",
        "",
        f"Distance to the teacher's latents on {SAMPLES} new noises (mean square / variance), without fresh noise:",
        "",
        "| steps | before | after |",
        "| ---: | ---: | ---: |",
    ]
    lines += [f"| {steps} | {a:.3f} | {b:.3f} |" for steps, a, b in zip(STEPS, before, after, strict=True)]
    if any(b >= a for a, b in zip(before, after, strict=True)):
        lines += [
            "",
            "At some step counts the latents are no nearer to the teacher's than without the LoRA. For prompts that "
            "stand for many pictures this says little: a blur is near to all of them. Look at the pictures and measure "
            "with Flash Evaluate; if it is no better there, train longer.",
        ]
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    """Return the mean of at least one number."""
    return sum(values) / len(values)


def in_minutes(seconds: float) -> str:
    """Return "1:05" for 65 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class Face:
    """What the node shows while it runs: a progress bar, a text with the time left, and pictures.

    Attributes:
        decode: latents to pictures; None where there is no VAE and ComfyUI knows no colours of the latents.
    """

    def __init__(
        self,
        request: Request,
        denoiser: ModelDenoiser,
        tell: Callable[[str], None],
        plot: Callable[[Sequence[float], int], None],
    ) -> None:
        self.request = request
        self.tell = tell
        self.plot = plot
        self.bar = comfy.utils.ProgressBar(1)
        self.decode = decoder(request, denoiser)
        self.drawn: tuple[Training, Bench] | None = None
        self._told = 0.0
        learners = {"the discriminator": request.settings.adversarial, "the critic": request.settings.critic}
        names = [name for name, learns in learners.items() if learns]
        self._helpers = f"{' and '.join(names)} learn{'s' * (len(names) == 1)}"

    def start(self, training: Training, bench: Bench) -> None:
        """Give what the pictures are drawn with."""
        self.drawn = (training, bench)

    def observe(self, progress: Progress) -> None:
        """Show where the run is."""
        every = self.request.preview_every
        picture = None
        if progress.doing == "updates" and every and progress.done % every == 0:
            picture = self._picture()
        self.bar.update_absolute(progress.done, progress.total, picture)
        now = time.monotonic()
        if progress.done == progress.total or now - self._told > SHOW_SECONDS:
            self._told = now
            self.tell(self._text(progress))
            if progress.doing == "updates" and self.drawn is not None:
                self.plot(self.drawn[0].losses, progress.total)

    def _picture(self) -> tuple[str, Any, int] | None:
        if self.drawn is None:
            return None
        training, bench = self.drawn
        with training.average.applied():
            return ("JPEG", as_image(report_picture(bench, self.decode, training.losses)), PREVIEW_SIDE)

    def _text(self, progress: Progress) -> str:
        left = ""
        if progress.made and progress.done < progress.total:
            seconds = progress.seconds / progress.made * (progress.total - progress.done)
            left = f", {in_minutes(seconds)} left"
        doing = {
            "trajectories": f"the teacher draws: {progress.done} of {progress.total}",
            "helpers": f"{self._helpers} before the last updates: {progress.done} of {progress.total}",
            "updates": f"update {progress.done} of {progress.total}",
        }[progress.doing]
        losses = "\n".join(f"{name} {value:.4g}" for name, value in progress.terms.items() if name != "total")
        return f"{doing}{left}\n{losses}".strip()


def decoder(request: Request, denoiser: ModelDenoiser) -> Decode | None:
    """Return what makes pictures of latents: the VAE, else ComfyUI's linear map to colours, else None."""
    model, vae = denoiser.patcher.model, request.vae

    def by_vae(latents: Tensor) -> Tensor:
        assert vae is not None
        with denoiser.other_models():
            pictures: Tensor = vae.decode(denoiser.comfy_latents(latents))
        return pictures.reshape(-1, *pictures.shape[-3:])[..., :3].clone()  # a video model's VAE keeps the frames

    if vae is not None:
        return by_vae
    latent_format = model.latent_format
    factors, bias = latent_format.latent_rgb_factors, getattr(latent_format, "latent_rgb_factors_bias", None)
    if factors is None or getattr(latent_format, "latent_rgb_factors_reshape", None) is not None:
        return None

    def by_colours(latents: Tensor) -> Tensor:
        # ComfyUI's factors are for latents as the network sees them, and give colours in -1..1.
        weight = torch.tensor(factors, device=latents.device).T
        offset = None if bias is None else torch.tensor(bias, device=latents.device)
        colours = F.linear(latents.float().movedim(1, -1), weight, offset)
        small = ((colours + 1) / 2).clamp(0, 1).movedim(-1, 1)
        return F.interpolate(small, scale_factor=PIXELS, mode="nearest").movedim(1, -1)

    return by_colours
