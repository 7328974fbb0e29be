"""What nodes ask of a MODEL and its VAE before they work with them."""

from __future__ import annotations

import comfy.model_base
import comfy.supported_models
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

# A conditioning's value that every ComfyUI model joins to the noisy latent as it is; ComfyUI does not resize it.
CONCAT_KEY = "noise_concat"


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
