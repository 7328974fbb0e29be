"""Facts of a MODEL (family, sizes), and a check that its VAE belongs to it."""

from __future__ import annotations

import comfy.model_base
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

from ...flash_core.families import Family, family_of, of_comfy_class, of_transformer_width

# A conditioning's value that every ComfyUI model joins to the noisy latent; ComfyUI does not resize it.
CONCAT_KEY = "noise_concat"
# The ModelPatcher attachments in which the facts of a few-step LoRA travel to the sampler: its own metadata, or the
# preset that it was taken for. A model has one of them at most.
METADATA_KEY = "flash_metadata"
PRESET_KEY = "flash_preset"
# ComfyUI's classes of models that draw single pictures, in the latents of a video model's VAE.
PICTURES_WITH_FRAMES = {"QwenImage"}

CHANNELS_PER_BLOCK = 64  # of SD3's transformers: the image stream is as many times 64 channels wide as they have blocks


def model_family(model: ModelPatcher) -> Family | None:
    """Return the model's family by the class of its ComfyUI configuration, or None for a class that has none."""
    config = model.model.model_config
    family = of_comfy_class([type(config).__name__])
    if family is not None and family.key == "sd3":  # ComfyUI has one class for SD3 and SD3.5
        by_width = of_transformer_width(config.unet_config.get("depth", 0) * CHANNELS_PER_BLOCK)
        if config.unet_config.get("x_block_self_attn_layers") or (by_width and family not in by_width):
            return family_of("sd35")
    return family


def model_base(model: ModelPatcher) -> str | None:
    """Return the key of the model's family, or None for a model of no known family."""
    family = model_family(model)
    return None if family is None else family.key


def model_bases(model: ModelPatcher) -> set[str]:
    """Return the keys of the model's family and of the family that it is a variant of, such as SDXL for SSD-1B."""
    return {family.key for family in (model_family(model), _nearest_family(model)) if family is not None}


def family_name(model: ModelPatcher) -> str:
    """Return the name of the model's family; for a model of no known family, its class in ComfyUI."""
    family = model_family(model)
    return type(model.model.model_config).__name__ if family is None else family.name


def describe_model(model: ModelPatcher) -> str:
    """Return the family's name with the width that tells the family: "SD 1.5 (attn2 reads 768 channels)"."""
    config = model.model.model_config
    family = model_family(model)
    if family is not None and family.sizes:
        width = config.unet_config.get("depth", 0) * CHANNELS_PER_BLOCK
        return f"{family.sized(width)} ({width} channels wide)"
    width = config.unet_config.get("context_dim")
    name = family_name(model)
    return f"{name} (attn2 reads {width} channels)" if width else name


def native_side(model: ModelPatcher) -> int:
    """Return the side in pixels of the square pictures that the model was trained on; 1024 for an unknown family."""
    family = _nearest_family(model)
    if family is None:
        return 1024
    predicts_v = model.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    return family.native_side if predicts_v or not family.epsilon_side else family.epsilon_side


def widest_ratio(model: ModelPatcher) -> float:
    """Return the largest ratio of a picture's longer side to its shorter side that the model can draw."""
    family = _nearest_family(model)
    return Family.widest if family is None else family.widest


def _nearest_family(model: ModelPatcher) -> Family | None:
    # ComfyUI's classes for variants of a family derive from the family's own.
    return of_comfy_class(kind.__name__ for kind in type(model.model.model_config).__mro__)


def check_vae(vae: VAE, model: ModelPatcher) -> None:
    """Raise ValueError where the VAE has another number of latent channels than the model."""
    wanted = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != wanted:
        raise ValueError(
            f"This VAE makes latents of {vae.latent_channels} channels; the model works on {wanted}. Connect the VAE "
            "that belongs to the model."
        )


def has_frames(model: ModelPatcher) -> bool:
    """Return whether the model's latents have a dimension of frames, (B, C, frames, h, w)."""
    return int(model.get_model_object("latent_format").latent_dimensions) == 3


def check_makes_pictures(model: ModelPatcher, node: str, *, with_frames: bool = False) -> None:
    """Raise ValueError where the model makes video or audio.

    Args:
        node: name of the node that asks.
        with_frames: allow models of pictures whose latents have a dimension of frames. Default: False.
    """
    dimensions = model.get_model_object("latent_format").latent_dimensions
    if with_frames and type(model.model).__name__ in PICTURES_WITH_FRAMES:
        return
    if dimensions != 2:
        raise ValueError(
            f"This model's latents have {dimensions} dimensions; expected 2, a picture's. {node} works with models "
            "that make pictures, such as SD 1.5, SDXL, PixArt, SD3 and Flux, not with video or audio models. Load "
            "such a model."
        )


def further_channels(model: ModelPatcher) -> int:
    """Return how many channels the model reads beside its noisy latent."""
    reads = model.model.model_config.unet_config.get("in_channels", 0)
    return int(reads) - int(model.get_model_object("latent_format").latent_channels)
