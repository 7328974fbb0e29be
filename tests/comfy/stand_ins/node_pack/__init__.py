"""Let ComfyUI's loaders recognise the stand-ins' small models, in the tests' server only. It registers no node.

ComfyUI recognises published models by their sizes. Each class here is ComfyUI's own class of a family, under the same
name, with the sizes of ``tests/families/networks.py``; text encoders get their sizes through ComfyUI's own option.
"""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.text_encoders.pixart_t5
import comfy.utils
from comfy import supported_models
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
from comfy.supported_models_base import ClipTarget

NODE_CLASS_MAPPINGS: dict[str, type] = {}

PIXART_WIDTH, T5_WIDTH = 96, 32
SDXL_TIME_WIDTH = 8
LAYERS = 3  # SDXL and SD3 read the last but one
T5 = {"t5xxl_model_config": {"d_model": T5_WIDTH, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}}


def clip_sizes(name: str, width: int) -> dict[str, dict[str, int]]:
    """A CLIP text encoder of this width, as an entry of ComfyUI's ``model_options``."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
    }
    return {f"{name}_model_config": sizes}


def reduced(text_encoder: Any, sizes: dict[str, Any]) -> Any:
    """A text encoder's class that is built with these sizes."""

    def build(*, model_options: dict[str, Any], **arguments: Any) -> Any:
        return text_encoder(model_options={**model_options, **sizes}, **arguments)

    return build


def reduced_target(target: ClipTarget, sizes: dict[str, Any]) -> ClipTarget:
    """The same tokenizer with a reduced text encoder."""
    return ClipTarget(target.tokenizer, reduced(target.clip, sizes))


class SD15(supported_models.SD15):
    """Stable Diffusion 1.5, CLIP-L 32 wide."""

    unet_config = {**supported_models.SD15.unet_config, "model_channels": 32, "context_dim": 32}  # noqa: RUF012
    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}  # noqa: RUF012

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        """CLIP-L."""
        return reduced_target(super().clip_target(state_dict or {}), clip_sizes("clip_l", 32))


class SDXL(supported_models.SDXL):
    """SDXL, CLIP-L 8 and CLIP-G 24 wide."""

    unet_config = {  # noqa: RUF012
        **supported_models.SDXL.unet_config,
        "model_channels": 32,
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "context_dim": 32,
        "adm_in_channels": 24 + 6 * SDXL_TIME_WIDTH,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Any:
        """The size and crop numbers are embedded 256 wide in the published model."""
        model = super().get_model(state_dict, prefix, device)
        model.embedder = Timestep(SDXL_TIME_WIDTH)
        return model

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        """CLIP-L and CLIP-G."""
        sizes = {**clip_sizes("clip_l", 8), **clip_sizes("clip_g", 24)}
        return reduced_target(super().clip_target(state_dict or {}), sizes)


class PixArtAlpha(supported_models.PixArtAlpha):
    """PixArt-alpha, whose sizes ComfyUI does not read from the file."""

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__({**unet_config, "hidden_size": PIXART_WIDTH, "num_heads": 6, "caption_channels": T5_WIDTH})


class SD3(supported_models.SD3):
    """SD3, whose own sizes ComfyUI reads from the file; CLIP-L 16 and CLIP-G 24 wide."""

    def clip_target(self, state_dict: Any = None) -> ClipTarget:
        """CLIP-L and CLIP-G; no T5, as in the published file ``incl_clips``."""
        sizes = {**clip_sizes("clip_l", 16), **clip_sizes("clip_g", 24)}
        return reduced_target(super().clip_target(state_dict or {}), sizes)


def register() -> None:
    """Put the reduced models before the published ones, and let a T5 of any width count as PixArt's."""
    supported_models.models[:0] = [SD15, SDXL, PixArtAlpha, SD3]

    published_pixart_te = comfy.text_encoders.pixart_t5.pixart_te
    published_detection = comfy.sd.detect_te_model
    published_names = comfy.utils.pixart_to_diffusers

    def detect(weights: dict[str, Any]) -> Any:
        is_t5 = "encoder.block.0.layer.0.SelfAttention.k.weight" in weights
        return comfy.sd.TEModel.T5_XXL if is_t5 else published_detection(weights)

    def names(config: dict[str, Any], output_prefix: str = "") -> dict[str, Any]:
        return published_names({"hidden_size": PIXART_WIDTH, **config}, output_prefix)

    comfy.sd.detect_te_model = detect
    comfy.utils.pixart_to_diffusers = names
    comfy.text_encoders.pixart_t5.pixart_te = lambda **facts: reduced(published_pixart_te(**facts), T5)


register()
