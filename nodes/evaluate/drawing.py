"""Draw what is compared: the teacher's two sets, Flash's few steps, and the undistilled model with as many passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ...flash_core.measures.random_features import RandomFeatures
from ...flash_core.measures.sharpness import contrast, sharpness
from ..sampling.compare import FLASH_GUIDANCE, Bench, Progress
from ..sampling.compare import Run as Drawn
from ..shared.inputs import MAX_SEED
from ..shared.schema import count
from .figures import PictureSet

TEACHER, FLASH, MODEL = "teacher", "Flash", "model"  # titles of ways; "model" is the teacher with few passes
SHOWN = 4  # prompts in the picture, the first ones; none is chosen
LARGEST_SHOWN = 256  # pixels, of the longer side of a shown picture


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        model: the teacher.
        flash_model: the same model with its few-step LoRA.
        positive: CONDITIONING, one entry for each prompt.
        negative: CONDITIONING of guidance's other branch.
        shape: (C, h, w) of a latent.
        per_prompt: pictures of each prompt in every run.
        steps: Flash's step counts.
        teacher_steps, guidance, sampler_name, scheduler: of the teacher, as KSampler has them.
        seed: of the first prompt's noise; the next prompts have the next seeds.
    """

    model: ModelPatcher
    flash_model: ModelPatcher
    positive: list[Any]
    negative: list[Any]
    shape: tuple[int, ...]
    per_prompt: int
    steps: tuple[int, ...]
    teacher_steps: int
    guidance: float
    sampler_name: str
    scheduler: str
    seed: int

    def seed_of(self, prompt: int, *, other: bool = False) -> int:
        """Return the seed of a prompt's noise; ``other`` gives the teacher's first set noise of its own."""
        return (self.seed + prompt + other * len(self.positive)) % (MAX_SEED + 1)


@dataclass(frozen=True)
class Way:
    """One way to draw, a row of the table.

    Attributes:
        title: TEACHER, FLASH or MODEL.
        steps: step count.
        guidance: classifier-free guidance; 1 is off.
        other_noise: whether the noise is not that of the other ways.
    """

    title: str
    steps: int
    guidance: float
    other_noise: bool = False


@dataclass(frozen=True)
class Run:
    """What a way drew.

    Attributes:
        way: how.
        passes: evaluations of the network for each picture, counted.
        seconds: to sample a picture, without VAE.
        pictures: the set as numbers.
        size: (height, width) of a picture.
        shown: (min(SHOWN, P), H, W, 3) the first picture of each of the first prompts.
    """

    way: Way
    passes: float
    seconds: float
    pictures: PictureSet
    size: tuple[int, int]
    shown: Tensor


def ways_of(request: Request) -> list[Way]:
    """Return the teacher's two sets, Flash's runs, and the undistilled model's with the same numbers of passes.

    Guidance takes two passes a step: 4 passes are 4 steps without guidance or 2 steps with guidance.
    """
    many, guidance = request.teacher_steps, request.guidance
    ways = [Way(TEACHER, many, guidance), Way(TEACHER, many, guidance, other_noise=True)]
    ways += [Way(FLASH, steps, FLASH_GUIDANCE) for steps in request.steps]
    ways += [Way(MODEL, steps, FLASH_GUIDANCE) for steps in request.steps]
    if guidance != FLASH_GUIDANCE:
        ways += [Way(MODEL, steps // 2, guidance) for steps in request.steps if steps % 2 == 0]
    return ways


def draw(request: Request, vae: VAE, tell: Callable[[str], None]) -> list[Run]:
    """Draw all pictures: first all latents, then their pictures, so that network and VAE are loaded once each.

    Args:
        tell: shows a text on the node's face.

    Raises:
        InterruptProcessingException: ComfyUI's, if the user interrupts.
    """
    ways, prompts = ways_of(request), len(request.positive)
    progress = Progress(request.model, len(request.positive) * sum(way.steps for way in ways))
    latents = []
    for way in ways:
        drawn = []
        for prompt in range(prompts):
            tell(f"{named(way)}: prompt {prompt + 1} of {prompts}")
            drawn.append(_sampled(request, way, prompt, progress))
        latents.append(drawn)
    looks = RandomFeatures()
    runs = []
    for way, drawn in zip(ways, latents, strict=True):
        tell(f"{named(way)}: pictures")
        runs.append(_measured(request, way, drawn, vae, looks))
    return runs


def named(way: Way) -> str:
    """Return "Flash, 2 steps" or "model, 2 steps, guidance 7"."""
    guided = f", guidance {way.guidance:g}" if way.guidance != FLASH_GUIDANCE else ""
    return f"{way.title}, {count(way.steps, 'step')}{guided}"


def _sampled(request: Request, way: Way, prompt: int, progress: Progress) -> Drawn:
    """Sample the latents of one prompt."""
    empty = torch.zeros(request.per_prompt, *request.shape)
    latent = comfy.sample.fix_empty_latent_channels(request.model, empty)
    seed = request.seed_of(prompt, other=way.other_noise)
    bench = Bench(
        positive=[request.positive[prompt]],
        negative=request.negative,
        latent=latent,
        noise=comfy.sample.prepare_noise(latent, seed),
        mask=None,
        seed=seed,
        progress=progress,
    )
    if way.title == FLASH:
        return bench.flash(request.flash_model, way.steps)
    return bench.teacher(request.model, way.steps, way.guidance, request.sampler_name, request.scheduler)


def _measured(request: Request, way: Way, drawn: Sequence[Drawn], vae: VAE, features: RandomFeatures) -> Run:
    """Decode the latents of all prompts, and keep their numbers and the few pictures that are shown."""
    found: list[PictureSet] = []
    shown = []
    for prompt, run in enumerate(drawn):
        comfy.model_management.throw_exception_if_processing_interrupted()
        decoded = vae.decode(run.latents)
        pictures = decoded.reshape(-1, *decoded.shape[-3:])[..., :3]  # a video model's VAE keeps the frames
        planes = pictures.movedim(-1, 1)
        found.append(PictureSet(features(planes).cpu(), sharpness(planes).cpu(), contrast(planes).cpu()))
        if prompt < SHOWN:
            shown.append(reduced(planes[:1]))
    passes = sum(run.evaluations for run in drawn) / len(drawn)
    seconds = sum(run.seconds for run in drawn) / (len(drawn) * request.per_prompt)
    height, width = pictures.shape[1:3]
    return Run(way, passes, seconds, PictureSet.joined(found), (height, width), torch.cat(shown))


def reduced(planes: Tensor) -> Tensor:
    """Return pictures (B, 3, H, W) as (B, h, w, 3) with sides of at most LARGEST_SHOWN pixels."""
    share = min(1.0, LARGEST_SHOWN / max(planes.shape[-2:]))
    size = [max(1, round(side * share)) for side in planes.shape[-2:]]
    return F.interpolate(planes, size, mode="area").movedim(1, -1)
