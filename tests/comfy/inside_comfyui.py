"""Run in a process that has ComfyUI on its path (see ``test_demo_models.py``): the demo's parts on given inputs.

python inside_comfyui.py COMFYUI ROOT TEACHER INPUTS OUTPUTS
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def main(comfyui: Path, root: Path, folder: Path, inputs: Path, outputs: Path) -> None:
    """Build the demo's models of ``folder`` and write what they make of the tensors in ``inputs``."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True  # before ComfyUI looks for a device
    args.use_pytorch_cross_attention = True

    import comfy.sample
    import comfy.samplers
    import torch
    from safetensors.torch import load_file, save_file

    spec = importlib.util.spec_from_file_location(
        "dropped_in", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["dropped_in"] = package
    spec.loader.exec_module(package)
    from dropped_in.nodes.demo_models import build_demo

    given = load_file(inputs)
    with torch.inference_mode():
        model, clip, vae = build_demo(folder)
        prompts = json.loads((inputs.parent / "prompts.json").read_text())
        conditioning = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]
        results = {f"text.{index}": cond[0][0] for index, cond in enumerate(conditioning)}
        results["unet"] = model.model.diffusion_model(given["latents"], given["timesteps"], context=given["context"])
        results["decoded"] = vae.decode(given["latents"])
        results["encoded"] = vae.encode(given["images"])
        empty = torch.zeros(2, 4, 16, 16)
        fixed = comfy.sample.fix_empty_latent_channels(model, empty)
        noise = comfy.sample.prepare_noise(fixed, 7)
        for sampler in ("euler", "ddim"):
            results[sampler] = comfy.sample.sample(
                model, noise, 8, 2.0, sampler, "simple", conditioning[0], conditioning[2], fixed, seed=7
            )
        results["noise"] = noise
        results["rgb_factors"] = torch.tensor(model.model.latent_format.latent_rgb_factors)
    save_file({name: value.float().contiguous() for name, value in results.items()}, outputs)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
