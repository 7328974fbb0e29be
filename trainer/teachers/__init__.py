"""Teachers: one file per model family, which builds a Denoiser from a diffusers folder or a single file.

To add a family, write a module with a :class:`~.base.Teacher` and name it in ``FAMILIES``,
and the family in :data:`flash_core.families.FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import ModelSection
    from .base import Outline, Teacher

# What a recipe calls the family -> (module here, class there). The modules are heavy: imported when asked for.
FAMILIES = {
    "demo": ("stable_diffusion", "Demo"),
    "sd15": ("stable_diffusion", "StableDiffusion15"),
    "sd21": ("stable_diffusion", "StableDiffusion21"),
    "sdxl": ("stable_diffusion_xl", "StableDiffusionXL"),
    "sd_x4": ("upscaler", "Upscaler"),
    "pixart_alpha": ("pixart", "PixArtAlpha"),
    "pixart_sigma": ("pixart", "PixArtSigma"),
    "sd3": ("stable_diffusion_3", "StableDiffusion3"),
    "sd35": ("stable_diffusion_3", "StableDiffusion35"),
}


def family(name: str) -> type[Teacher]:
    """Return the class of a family's teacher.

    Raises:
        UserError: there is no such family.
    """
    if name not in FAMILIES:
        raise UserError(f"model.family: there is no family {name!r}; expected one of {', '.join(FAMILIES)}")
    module, attribute = FAMILIES[name]
    teacher: type[Teacher] = getattr(import_module(f".families.{module}", __name__), attribute)
    return teacher


def load_teacher(
    model: ModelSection, device: str = "cpu", resolution: int | None = None, *, staged: bool = False
) -> Teacher:
    """Load a teacher's weights.

    Args:
        model: the recipe's section.
        device: where its networks run.
        resolution: width and height in pixels (default: the model's own).
        staged: text encoders, VAE and network are on the device one after the other, until ``stages.end()``.

    Raises:
        UserError: no such family or folder, or a part of the model is missing.
    """
    return family(model.family).load(model, device, resolution, staged=staged)


def outline_teacher(model: ModelSection, resolution: int | None = None) -> Outline:
    """Read a teacher's configuration files, without its weights."""
    return family(model.family).outline(model, resolution)
