"""Stable Diffusion XL: a UNet on two text encoders, a pooled text and the sizes that pictures had.

The UNet reads six numbers: original height, original width, crop top, crop left, target height, target width. Here the
original and the target are the resolution, and the crop is 0, 0, as in diffusers' pipeline, whatever sizes the training
pictures had. Sampling uses these numbers too, so teacher and student see the same conditions in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from ....flash_core.denoiser import Conditioning
from ...errors import UserError
from ..base import Teacher
from .stable_diffusion import UNetDenoiser


class SDXLDenoiser(UNetDenoiser):
    """A UNet on text, the pooled text (``vector``) and sizes (``size_ids``)."""

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Any]:
        """Return the pooled text and the sizes, by the UNet's names."""
        if conditioning.vector is None or conditioning.size_ids is None:
            raise ValueError("SDXL is conditioned on a pooled text (vector) and on sizes (size_ids); give both")
        return {"text_embeds": conditioning.vector, "time_ids": conditioning.size_ids}


class StableDiffusionXL(Teacher):
    """An SDXL base model."""

    base = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    network_class = UNet2DConditionModel
    network_part = "unet"
    denoiser_class = SDXLDenoiser
    default_config = "stabilityai/stable-diffusion-xl-base-1.0"
    unused_parts = ("feature_extractor", "image_encoder")
    task_pipelines = "StableDiffusionXL"

    @classmethod
    def check_network(cls, config: Mapping[str, Any], name: str) -> None:
        """Check that the UNet reads sizes and a pooled text."""
        if config.get("addition_embed_type") != "text_time":
            raise UserError(
                f"model.family: the UNet of {name} does not read sizes and pooled text, so it is no SDXL model; set "
                "model.family: sd15 or sd21, or choose an SDXL model"
            )

    def text_conditions(self, prompts: Sequence[str]) -> Conditioning:
        """Return both encoders' penultimate hidden states side by side (B, L, D), and the second's pooled text."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return self.with_size(Conditioning(cross_attention=hidden, vector=pooled), self.resolution)

    def encode_empty(self) -> Conditioning:
        """Return zeros if the pipeline's configuration asks for zeros (SDXL), else the empty prompt's conditions."""
        empty = self.encode_prompts([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        assert empty.cross_attention is not None
        assert empty.vector is not None
        return Conditioning(
            cross_attention=torch.zeros_like(empty.cross_attention),
            vector=torch.zeros_like(empty.vector),
            size_ids=empty.size_ids,
        )

    def size_ids(self, height: int, width: int) -> list[float]:
        """Return the size as the original's and the target's, uncropped."""
        return [height, width, 0, 0, height, width]
