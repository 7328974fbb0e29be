"""Super-resolution with models that read the low-resolution picture as further channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ..config import Section
from ..errors import UserError
from .base import Task
from .degradation import degrade
from .figures import PERCEPTUAL, Figure, Scene
from .scores import distance, psnr, reduced

if TYPE_CHECKING:
    from ..teachers.base import Teacher

PIXEL_CHANNELS = 3
Strength = Annotated[float, Field(ge=0)]
Quality = Annotated[int, Field(ge=1, le=95)]
Level = Annotated[int, Field(ge=0, le=999)]


class SuperResolutionOptions(Section):
    """The degradation of pictures, and how the model reads the small picture."""

    scale: int = Field(4, ge=2, description="how many times larger the result is")
    reads: Literal["latent", "pixels"] = Field(
        "latent",
        description="latent: the enlarged picture's latents join the noisy latents; pixels: the small picture joins "
        "them and must have the latent's size (the SD x4 upscaler)",
    )
    blur: tuple[Strength, Strength] = Field((0.0, 0.5), description="Gaussian blur, in pixels of the small picture")
    noise: tuple[Strength, Strength] = Field(
        (0.0, 0.02), description="standard deviation of Gaussian noise, for colours in [0, 1]"
    )
    jpeg: tuple[Quality, Quality] | None = Field((60, 95), description="JPEG quality; null for no JPEG")
    noise_level: tuple[Level, Level] | None = Field(
        None,
        description="for models that read a noise level (the SD x4 upscaler): low and high of the noise added to the "
        "small picture, as timesteps of the model's schedule for small pictures",
    )

    @model_validator(mode="after")
    def _ranges_rise(self) -> SuperResolutionOptions:
        for name in ("blur", "noise", "jpeg", "noise_level"):
            limits = getattr(self, name)
            if limits is not None and limits[0] > limits[1]:
                raise ValueError(f"{name} must be [low, high] with low <= high, got {list(limits)}")
        return self


class SuperResolution(Task):
    """Enlarge a small picture; both branches of guidance see the small picture."""

    name = "super-resolution"
    options_class: ClassVar[type[Section]] = SuperResolutionOptions
    options: SuperResolutionOptions
    figures = (
        Figure(
            "psnr",
            "PSNR to the original",
            "PSNR",
            "Blurred pictures score well, because detail in a wrong place counts twice. Read it together with the "
            "feature distance (arXiv 1711.06077).",
            higher_is_better=True,
            unit="dB",
        ),
        Figure(
            "features",
            "Feature distance to the original",
            "features",
            "Distance between the result and the original in feature space; it grows with blur and wrong shapes.",
            higher_is_better=False,
        ),
        PERCEPTUAL,
        Figure(
            "consistency",
            "Consistency with the small picture",
            "consistent",
            "PSNR between the reduced result and the original reduced without blur, noise and JPEG.",
            higher_is_better=True,
            unit="dB",
        ),
    )

    def extra_channels(self, latent_channels: int) -> int:
        """Return the channels of the enlarged picture's latents, or the small picture's 3 colours."""
        return latent_channels if self.options.reads == "latent" else PIXEL_CHANNELS

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``small``, the degraded picture; ``noise_level`` (B,) and ``noise`` if the model reads a level."""
        options = self.options
        small = degrade(images, options.scale, generator, blur=options.blur, noise=options.noise, jpeg=options.jpeg)
        if options.noise_level is None:
            return {"small": small}
        low, high = options.noise_level
        level = torch.randint(low, high + 1, (len(small),), generator=generator).to(small.device)
        noise = torch.randn(small.shape, generator=generator).to(small)
        return {"small": small, "noise_level": level, "noise": noise}

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """Return the small picture in the model's channels."""
        small, level = drawn["small"], drawn.get("noise_level")
        process = teacher.low_resolution_process
        if (process is None) != (level is None):
            read = "a noise level" if level is None else "no noise level"
            wanted = "[low, high], such as [0, 350]" if level is None else "null"
            given = self.options.noise_level and list(self.options.noise_level)
            raise UserError(
                f"task.options.noise_level: {teacher.name} reads {read} of its input; expected {wanted}, got {given}"
            )
        if process is not None and level is not None:
            small = process.add_noise(small, drawn["noise"], level)
        if self.options.reads == "latent":
            return Conditioning(concat=low_resolution_latents(small, teacher.resolution, teacher), noise_level=level)
        size = teacher.latent_shape[1:]
        if tuple(small.shape[-2:]) != tuple(size):
            raise UserError(
                f"task.options.reads: 'pixels' joins the small picture to the latent, but it has "
                f"{small.shape[-2]} x {small.shape[-1]} pixels and the latent is {size[0]} x {size[1]}; set "
                f"task.options.scale to {teacher.scale_factor}, or reads to 'latent'"
            )
        return Conditioning(concat=small, noise_level=level)

    def scores(self, made: Tensor, scene: Scene) -> dict[str, Tensor]:
        """Return the measures against the original, and against the reduced original."""
        originals, scale = scene.originals, self.options.scale
        found = {
            "psnr": psnr(made, originals),
            "features": distance(scene.look(made), scene.look(originals)),
            "consistency": psnr(reduced(made, scale), reduced(originals, scale)),
        }
        if scene.perceptual is not None:
            found["lpips"] = scene.perceptual(made, originals)
        return found

    def shown(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the small picture."""
        return {"small": (drawn["small"] / 2 + 0.5).clamp(0, 1)}


def low_resolution_latents(small: Tensor, size: tuple[int, int], teacher: Teacher) -> Tensor:
    """Return the latents (B, C, h, w) of small pictures (B, 3, h', w') in [-1, 1], enlarged to ``size`` pixels."""
    enlarged = F.interpolate(small, size, mode="bicubic", antialias=True).clamp(-1, 1)
    return teacher.encode(enlarged)
