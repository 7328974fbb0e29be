"""Write the stand-ins of the workflows' base models (see ``files.py``), in a process with ComfyUI in it.

python write.py COMFYUI ROOT NETWORKS MODELS

NETWORKS holds ``<family>.safetensors`` and ``<family>.json``, a diffusers network's weights and config, and a
``controlnet.safetensors``. Checkpoints are written by ComfyUI's own saving, so their layout is the published one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "inside"), str(HERE)]

from boot import boot  # noqa: E402

# By these keys ComfyUI sees which text encoders an SD3 checkpoint holds.
SD3_ENCODERS = [f"text_encoders.{name}.transformer.text_model.final_layer_norm.weight" for name in ("clip_l", "clip_g")]


def randomise(module: Any, generator: Any) -> Any:
    """Random weights that keep activations at a sensible size: ComfyUI's modules are built uninitialised."""
    import torch

    with torch.no_grad():
        for name, value in module.named_parameters():
            if name.endswith(("vae_scale", "vae_shift", "logit_scale")):
                continue
            noise = torch.randn(value.shape, generator=generator)
            is_norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(1 + 0.1 * noise if is_norm else noise / max(value[0].numel(), 1) ** 0.5)
    return module


def main(comfyui: Path, root: Path, networks: Path, models: Path) -> None:
    """Write what the workflows load, under the names they use."""
    boot(comfyui, root)
    import comfy.sd
    import node_pack
    import torch
    from comfy.taesd.taesd import TAESD
    from comfy.text_encoders.pixart_t5 import PixArtTokenizer, pixart_te
    from dropped_in.nodes.control.files import controlnet_config, controlnet_weights
    from safetensors.torch import load_file, save_file
    from tiny import tiny_model

    generator = torch.Generator().manual_seed(0)

    def text_encoder(target: Any) -> Any:
        clip = comfy.sd.CLIP(target)
        randomise(clip.cond_stage_model, generator)
        return clip

    def autoencoder(channels: int) -> dict[str, Any]:
        # The small autoencoder that ComfyUI knows by its keys; the published one would have 84 M weights.
        return randomise(TAESD(latent_channels=channels), generator).state_dict()

    def checkpoint(family: str, config: type, name: str, channels: int, encoders: dict[str, Any] | None = None) -> None:
        weights = load_file(networks / f"{family}.safetensors")
        model = tiny_model(
            family.removesuffix("_inpainting"), weights, json.loads((networks / f"{family}.json").read_text())
        )
        clip = text_encoder(config(dict(model.model.model_config.unet_config)).clip_target(encoders))
        comfy.sd.save_checkpoint(
            str(models / "checkpoints" / name), model, clip, comfy.sd.VAE(sd=autoencoder(channels))
        )

    for folder in ("checkpoints", "controlnet", "diffusion_models", "text_encoders", "vae"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        checkpoint("sd15", node_pack.SD15, "v1-5-pruned-emaonly-fp16.safetensors", 4)
        checkpoint("sd15_inpainting", node_pack.SD15, "sd-v1-5-inpainting.safetensors", 4)
        checkpoint("sdxl", node_pack.SDXL, "sd_xl_base_1.0.safetensors", 4)
        checkpoint("sd3", node_pack.SD3, "sd3_medium_incl_clips.safetensors", 16, dict.fromkeys(SD3_ENCODERS))

        # The ControlNet's names are those of the original repository.
        control = load_file(networks / "controlnet.safetensors")
        native = controlnet_weights(control, controlnet_config(control))
        named = {f"control_model.{name}": value for name, value in native.items()}
        save_file(named, models / "controlnet/control_v11p_sd15_canny_fp16.safetensors")

        # PixArt's files are diffusers' and transformers' own.
        pixart = load_file(networks / "pixart_alpha.safetensors")
        save_file(pixart, models / "diffusion_models/PixArt-XL-2-1024-MS.safetensors")
        t5 = text_encoder(comfy.supported_models_base.ClipTarget(PixArtTokenizer, pixart_te())).get_sd()
        names = {key.removeprefix("t5xxl.transformer."): value for key, value in t5.items() if ".transformer." in key}
        save_file(names, models / "text_encoders/t5xxl_fp16.safetensors")
        save_file(autoencoder(4), models / "vae/pixart_alpha_vae.safetensors")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
