"""The demo's parts on given inputs (see ``test_demo_models.py``).

python demo_models.py COMFYUI ROOT TEACHER INPUTS OUTPUTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import boot


def main(comfyui: Path, root: Path, folder: Path, inputs: Path, outputs: Path) -> None:
    """Build the demo's models of ``folder`` and write their outputs for the tensors in ``inputs``."""
    boot(comfyui, root)
    import comfy.sample
    import torch
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.sampling.few_step import flash_grid
    from safetensors.torch import load_file, save_file

    given = load_file(inputs)
    with torch.inference_mode():
        model, clip, vae = build_demo(folder)
        prompts = json.loads((inputs.parent / "prompts.json").read_text())
        conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]
        results = {f"text.{index}": cond[0][0] for index, cond in enumerate(conditioning)}
        results["unet"] = model.model.diffusion_model(given["latents"], given["timesteps"], context=given["context"])
        results["decoded"] = vae.decode(given["latents"])
        results["encoded"] = vae.encode(given["images"])
        fixed = comfy.sample.fix_empty_latent_channels(model, torch.zeros(2, 4, 16, 16))
        noise = comfy.sample.prepare_noise(fixed, 7)
        for sampler in ("euler", "ddim"):
            results[sampler] = comfy.sample.sample(
                model, noise, 8, 2.0, sampler, "simple", conditioning[0], conditioning[2], fixed, seed=7
            )
        results["noise"] = noise
        for steps in range(1, 9):
            results[f"sigmas.{steps}"] = flash_grid(model, steps).sigmas
        results["sigmas.half"] = flash_grid(model, 4, 0.5).sigmas
        results["rgb_factors"] = torch.tensor(model.model.latent_format.latent_rgb_factors)
    save_file({name: value.float().contiguous() for name, value in results.items()}, outputs)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
