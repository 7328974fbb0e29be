"""Inpainting with tiny Stable Diffusion UNets, of 4 and of 9 channels (see ``test_inpainting_parity.py``).

python inpainting.py COMFYUI ROOT FOLDER

FOLDER holds for each number of channels a folder with ``FAMILY.safetensors`` and ``FAMILY.json``, and
``FAMILY.given.safetensors``. Written there are ``results.safetensors``, latents as the network sees them, and
``timesteps.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from boot import boot
from sampling_families import SEED, conditioning, load, sample

FAMILIES = ("sd15", "sdxl")
STEPS = (1, 2, 4)
DENOISE = (1.0, 0.75)
EDGE = 1e-4  # how far the almost hard mask is from 0 and 1
GUIDANCE = 3.0


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Sample with Flash Sampler; 9-channel models get the channels of InpaintModelConditioning."""
    boot(comfyui, root)
    import torch
    from dropped_in.nodes.sampling.few_step import flash_grid
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    results, timesteps = {}, {}
    with torch.inference_mode():
        for family in FAMILIES:
            given = load_file(folder / f"{family}.given.safetensors")
            ordinary, wide = (load(family, folder / channels) for channels in ("4", "9"))
            for steps in STEPS:
                for denoise in DENOISE:
                    timesteps[f"{steps}, {denoise}"] = list(flash_grid(ordinary, steps, denoise).timesteps)
                    made = inpaint(ordinary, wide, given, steps, denoise)
                    results |= {f"{family}, {steps}, {denoise}, {name}": value for name, value in made.items()}
            results |= {f"{family}, {name}": value for name, value in others(ordinary, given).items()}
    save_file({name: value.contiguous() for name, value in results.items()}, folder / "results.safetensors")
    (folder / "timesteps.json").write_text(json.dumps(timesteps))


def inpaint(ordinary: Any, wide: Any, given: dict[str, Any], steps: int, denoise: float) -> dict[str, Any]:
    """Sample hard masks with the ordinary model, and with the 9-channel model without and with the noise mask."""
    positive = conditioning(given, "positive")
    picture = {"samples": ordinary.model.process_latent_out(given["picture"].clone())}
    masked = {**picture, "noise_mask": given["mask"]}
    channels = {
        "concat_latent_image": wide.model.process_latent_out(given["masked"].clone()),
        "concat_mask": given["mask"],
    }
    attached = [[tokens, {**entries, **channels}] for tokens, entries in positive]
    settings = {"steps": steps, "denoise": denoise}
    return {
        "4": sample(ordinary, positive, masked, **settings),
        "9": sample(wide, attached, picture, **settings),
        "9, masked": sample(wide, attached, masked, **settings),
    }


def others(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Sample an ordinary model with guidance, with an almost hard mask, without a picture, and in core's own nodes."""
    import comfy.samplers
    import torch
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from dropped_in.nodes.sampling.few_step import flash_grid
    from dropped_in.nodes.sampling.nodes import FlashSamplerSelect

    positive, negative = conditioning(given, "positive"), conditioning(given, "negative")
    picture = {"samples": model.model.process_latent_out(given["picture"].clone())}
    masked = {**picture, "noise_mask": given["mask"]}
    almost = {**picture, "noise_mask": given["mask"].clamp(EDGE, 1 - EDGE)}
    soft = {**picture, "noise_mask": given["mask"] * 0.5}
    everywhere = {**picture, "noise_mask": torch.ones_like(given["mask"])}
    results = {
        "guided": sample(model, positive, masked, guidance=GUIDANCE, negative=negative),
        "almost hard": sample(model, positive, almost),
        "soft": sample(model, positive, soft),
        "everywhere": sample(model, positive, everywhere),
        "a picture": sample(model, positive, picture),
        "no picture": sample(model, positive, {"samples": torch.zeros_like(given["picture"])}),
    }
    flash, euler = FlashSamplerSelect.execute(1.0).args[0], comfy.samplers.sampler_object("euler")
    noised = {"samples": 80 * picture["samples"]}
    for name, sampler, steps, latent in (
        ("SamplerCustom", flash, 4, masked),
        ("euler in SamplerCustom", euler, 1, masked),
        ("continued", flash, 1, noised),
        ("euler, continued", euler, 1, noised),
    ):
        sigmas, add_noise = flash_grid(model, steps).sigmas, latent is masked
        made = SamplerCustom.execute(model, add_noise, SEED, 1.0, positive, negative, sampler, sigmas, latent)
        results[name] = model.model.process_latent_in(made.args[0]["samples"])
    return results


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
