"""Stable Diffusion 3 and 3.5 medium: a transformer over image and text tokens together, rectified flow.

Two CLIP encoders and, optionally, T5 encode the text. SD3.5 normalises queries and keys; the first blocks of SD3.5
medium have a second attention over the image alone (MMDiT-X).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from ....flash_core.denoiser import Conditioning
from ...config import ModelSection
from ...errors import UserError
from ..loading.single_file import SINGLE_FILE_PARTS, weight_names
from ..loading.source import Source
from .transformer import TransformerDenoiser, TransformerTeacher

T5_PARTS = ("text_encoder_3", "tokenizer_3")
T5_LENGTH = 256  # tokens; the default of diffusers' pipeline

logger = logging.getLogger(__name__)


class SD3Denoiser(TransformerDenoiser):
    """``SD3Transformer2DModel`` on text tokens and the pooled vector, with the residuals of a ControlNet if given."""

    network: SD3Transformer2DModel

    def forward(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity (B, C, H, W)."""
        if conditioning.size_ids is not None or conditioning.attention_mask is not None:
            raise ValueError(
                "SD3 takes text, a pooled vector, extra channels and residuals; size_ids or a mask were given"
            )
        inputs = z_t if conditioning.concat is None else torch.cat([z_t, conditioning.concat], dim=1)
        output: Tensor = self.network(
            inputs,
            encoder_hidden_states=conditioning.cross_attention,
            pooled_projections=conditioning.vector,
            timestep=t,
            block_controlnet_hidden_states=list(conditioning.residuals) or None,
            return_dict=False,
        )[0]
        return output


class StableDiffusion3(TransformerTeacher):
    """SD3 medium."""

    base = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    network_class = SD3Transformer2DModel
    denoiser_class = SD3Denoiser
    default_config = "stabilityai/stable-diffusion-3-medium-diffusers"
    unused_parts = ("image_encoder", "feature_extractor")
    # Attention of the image, of the text (add_*) and, by the same names, MMDiT-X's second attention. ComfyUI can patch
    # every one of these layers (comfy.utils.mmdit_to_diffusers).
    default_targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip

    @classmethod
    def locate(cls, model: ModelSection) -> Source:
        """Return where the model is; a single file's family is read from the names of its layers.

        Raises:
            UserError: no model at the path, or a file of another family.
        """
        source = super().locate(model)
        if source.file is not None:
            names = weight_names(source.file)
            if not any("joint_blocks." in name for name in names):
                raise UserError(
                    f"model.path: {source.file} is no SD3 or SD3.5 checkpoint (it has no joint blocks); "
                    "choose such a file, or another model.family"
                )
            cls._check_generation(any(name.endswith(".x_block.attn.ln_q.weight") for name in names), source.name)
        return source

    @classmethod
    def check_network(cls, config: Mapping[str, Any], name: str) -> None:
        """Check the class, and the generation: SD3.5 normalises queries and keys, SD3 does not."""
        kind = config.get("_class_name")
        if kind != SD3Transformer2DModel.__name__:
            raise UserError(f"model.family: the transformer of {name} is {kind}; expected an SD3 or SD3.5 model")
        cls._check_generation(bool(config.get("qk_norm")), name)

    @classmethod
    def _check_generation(cls, normalised: bool, name: str) -> None:
        found = "sd35" if normalised else "sd3"
        if found != cls.base:
            raise UserError(f"model.family: {name} is of the family {found}, not {cls.base}; set model.family: {found}")

    @classmethod
    def absent_parts(cls, model: ModelSection) -> tuple[str, ...]:
        """Return the unused parts, and T5's parts if the recipe or the model has no T5."""
        if model.t5:
            source = cls.locate(model)
            if _has_t5(source):
                return cls.unused_parts
            logger.warning("%s has no T5 (text_encoder_3): CLIP alone reads the prompts", source.name)
        return (*cls.unused_parts, *T5_PARTS)

    def prompt_lengths(self) -> dict[str, int]:
        """Return CLIP's lengths, and T5's, which the pipeline sets whatever the tokenizer says."""
        lengths = super().prompt_lengths()
        return lengths | ({"tokenizer_3": T5_LENGTH} if "tokenizer_3" in lengths else {})

    def text_conditions(self, prompts: Sequence[str]) -> Conditioning:
        """Return CLIP's and T5's tokens (B, 77 + 256, D) in this order, and CLIP's pooled vectors (B, D_L + D_G).

        Without T5 its tokens are zeros, as in diffusers' pipeline.
        """
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=T5_LENGTH,
        )
        return Conditioning(cross_attention=hidden, vector=pooled)


class StableDiffusion35(StableDiffusion3):
    """SD3.5, medium (MMDiT-X) or large."""

    base = "sd35"
    default_config = "stabilityai/stable-diffusion-3.5-medium"


def _has_t5(source: Source) -> bool:
    """Return whether the third text encoder is in the single file, the folder or the Hub's repository."""
    folder = Path(source.config)
    if source.file is not None:
        included = any(name.startswith(SINGLE_FILE_PARTS["text_encoder_3"]) for name in weight_names(source.file))
        # The configuration on the Hub may have weights too, but only a folder on this disk has them for sure.
        return included or any((folder / "text_encoder_3").glob("*.safetensors"))
    index = source.part_config("")
    return all(
        (index.get(part) or [None])[0] is not None and (not folder.is_dir() or (folder / part).is_dir())
        for part in T5_PARTS
    )
