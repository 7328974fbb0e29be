"""What nodes ask of a MODEL, its VAE and its prompts before they work with them."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.supported_models
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

# A conditioning's value that every ComfyUI model joins to the noisy latent as it is; ComfyUI does not resize it.
CONCAT_KEY = "noise_concat"
METADATA_KEY = "flash_metadata"  # the ModelPatcher attachment in which a LoRA's metadata travels to the sampler

# ComfyUI's model configurations by the names that Flash metadata has for their bases.
BASES = {
    "SD15": "sd15",
    "SD20": "sd21",
    "SD_X4Upscaler": "sd_x4",
    "SDXL": "sdxl",
    "PixArtAlpha": "pixart",
    "PixArtSigma": "pixart-sigma",
    "Flux": "flux",
}


SD35_LARGE_BLOCKS = 38


def model_base(model: ModelPatcher) -> str | None:
    """The model's base as Flash metadata names it, or None for one that has no name there."""
    config = model.model.model_config
    if type(config).__name__ == "SD3":
        sizes = config.unet_config
        newer = sizes.get("x_block_self_attn_layers") or sizes.get("depth") == SD35_LARGE_BLOCKS
        return "sd35" if newer else "sd3"
    return BASES.get(type(config).__name__)


def describe_model(model: ModelPatcher) -> str:
    """The model's family in words, with the width that tells it from others of its kind."""
    config = model.model.model_config
    family = vars(type(config)).get("family", type(config).__name__)
    sizes = config.unet_config
    if family == "SD3":
        family = "SD3.5" if model_base(model) == "sd35" else "SD3"
        return f"{family} ({sizes.get('depth', 0) * 64} channels wide)"
    width = sizes.get("context_dim")
    return f"{family} (attn2 reads {width} channels)" if width else family


def native_side(model: ModelPatcher) -> int:
    """The side of the square pictures that a model was trained on, in pixels."""
    config = model.model.model_config
    # Asked of the class: newer ComfyUI's configurations answer any attribute, with a warning in the log.
    known = getattr(type(config), "native_side", None)
    if known is not None:
        return int(known)
    if isinstance(config, comfy.supported_models.SD15):
        return 512
    if isinstance(config, comfy.supported_models.SD20):
        return 768 if model.model.model_type == comfy.model_base.ModelType.V_PREDICTION else 512
    return 1024


def check_vae(vae: VAE, model: ModelPatcher) -> None:
    """Raise where the VAE's latents are not this model's."""
    wanted = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != wanted:
        raise ValueError(
            f"This VAE makes latents of {vae.latent_channels} channels, the model works on {wanted}. Connect the VAE "
            "that belongs to the model."
        )


def text_width(model: ModelPatcher) -> int | None:
    """The width of the text embeddings that a UNet reads; None where ComfyUI makes something else of them first."""
    inner = model.model
    if not isinstance(inner.diffusion_model, UNetModel):
        return None
    if type(inner).extra_conds is not comfy.model_base.BaseModel.extra_conds:
        return None
    return inner.model_config.unet_config.get("context_dim")


def check_prompts(model: ModelPatcher, **prompts: list[Any] | None) -> None:
    """Raise where a connected prompt, by its input's name, can't be this model's.

    ComfyUI makes grey of an empty list, and fails on another model's text with the shapes of two matrices.
    """
    width = text_width(model)
    for name, prompt in prompts.items():
        if prompt is not None and not prompt:
            raise ValueError(
                f"What is connected to '{name}' holds no prompt: the list is empty. Connect a CLIP Text Encode; its "
                "text may be empty."
            )
        for tokens, _ in prompt or []:
            if width is not None and tokens is not None and tokens.shape[-1] != width:
                raise ValueError(
                    f"What is connected to '{name}' was encoded for another model: its text embeddings are "
                    f"{tokens.shape[-1]} wide, and the model is {describe_model(model)}. Encode it with the CLIP that "
                    "belongs to the model."
                )
