"""The Stable Diffusion x4 upscaler: a UNet on the small picture itself, its noise level, and text.

The small picture joins the latent as three channels: one pixel for one latent position, since the VAE has 4 pixels a
position. First noise is added to the small picture, on its own schedule. The UNet reads the noise level as a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import StableDiffusionUpscalePipeline

from ...errors import UserError
from ..schedulers import process_from_scheduler
from .stable_diffusion import StableDiffusion


class Upscaler(StableDiffusion):
    """The SD x4 upscaler, and models fine-tuned from it."""

    base = "sd_x4"
    pipeline_class = StableDiffusionUpscalePipeline
    default_config = "stabilityai/stable-diffusion-x4-upscaler"
    unused_parts = ("safety_checker", "feature_extractor", "watermarker")
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    task_pipelines = ""

    @classmethod
    def check_network(cls, config: Mapping[str, Any], name: str) -> None:
        """Check that the UNet reads a noise level as a class."""
        if config.get("num_class_embeds") is None:
            raise UserError(
                f"model.family: the UNet of {name} does not read the noise level of its input, so it is no x4 "
                "upscaler; set model.family: sd15, sd21 or sdxl, or choose an x4 upscaler"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.low_resolution_process = process_from_scheduler(self.pipeline.low_res_scheduler.config)
