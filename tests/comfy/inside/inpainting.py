"""Inpainting with a tiny 9-channel Stable Diffusion UNet (see ``test_inpainting_parity.py``).

python inpainting.py COMFYUI ROOT FOLDER

FOLDER holds ``unet.safetensors``, ``unet.json`` (its configuration) and ``given.safetensors``; the results are written
beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import boot


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Sample with Flash Sampler's grid and sampler, mask and masked picture given as InpaintModelConditioning does."""
    boot(comfyui, root)
    import comfy.sample
    import comfy.samplers
    import torch
    from dropped_in.nodes.few_step import flash_grid, flash_sampler
    from safetensors.torch import load_file, save_file
    from tiny import tiny_model

    given = load_file(folder / "given.safetensors")
    results = {}
    with torch.inference_mode():
        config = json.loads((folder / "unet.json").read_text())
        model = tiny_model("sd15", load_file(folder / "unet.safetensors"), config)
        values = {"concat_latent_image": given["masked"], "concat_mask": given["mask"]}
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": [[given["context"], values]]})
        empty = torch.zeros_like(given["masked"])
        for steps in (1, 2, 4):
            noise = comfy.sample.prepare_noise(empty, 3)
            sigmas = flash_grid(model, steps).sigmas
            results[str(steps)] = guider.sample(noise, empty, flash_sampler(), sigmas, seed=3)
    save_file({name: value.contiguous() for name, value in results.items()}, folder / "results.safetensors")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
