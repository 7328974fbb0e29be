"""A concat model with Flash Concat Conditioning (see ``test_concat.py``).

python concat.py COMFYUI ROOT ADAPTER INPUTS OUTPUTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from boot import boot


def main(comfyui: Path, root: Path, adapter: Path, inputs: Path, outputs: Path) -> None:
    """Sample with the demo and the task adapter; print the errors of wrong inputs as JSON."""
    boot(comfyui, root)
    sys.path.insert(0, str(comfyui))
    import comfy.sample
    import comfy.samplers
    import torch
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.picture.concat import FlashConcatConditioning
    from dropped_in.nodes.sampling.few_step import flash_grid, flash_sampler
    from safetensors.torch import load_file, save_file

    given = load_file(inputs)
    refusals = {}
    with torch.inference_mode():
        model, clip, vae = build_demo(adapter=adapter)
        plain, _, _ = build_demo()
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize("red apple"))
        empty = {"samples": torch.zeros(1, 16, 16, 16)}
        pictures = {"mask": given["mask"], "image": given["image"], "image_2": given["image_2"]}

        def attach(**changes):
            values = {
                "model": model,
                "positive": prompt,
                "latent_image": empty,
                "order": "mask, image, image_2",
                "images_as": "latent",
                "vae": vae,
                **pictures,
                **changes,
            }
            return FlashConcatConditioning.execute(**values)

        positive, _, report = attach().result
        results = {"concat": positive[0][1]["noise_concat"]}
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        for steps in (1, 2, 4):
            noise = comfy.sample.prepare_noise(empty["samples"], 11)
            results[f"sampled.{steps}"] = guider.sample(
                noise, empty["samples"], flash_sampler(), flash_grid(model, steps).sigmas, seed=11
            )
        for name, changes in {
            "another order": {"order": "mask, image"},
            "an unknown name": {"order": "mask, picture"},
            "a name twice": {"order": "mask, mask"},
            "nothing": {"order": "", "mask": None, "image": None, "image_2": None},
            "too few channels": {"order": "mask, image", "image_2": None},
            "no concat model": {"model": plain},
            "another shape": {"image": torch.zeros(1, 64, 128, 3)},
            "three masks": {"mask": torch.zeros(3, 128, 128)},
            "no VAE": {"vae": None},
        }.items():
            try:
                attach(**changes)
            except ValueError as error:
                refusals[name] = str(error)
    save_file({name: value.float().contiguous() for name, value in results.items()}, outputs)
    sys.stdout.write(json.dumps({"report": report, "refusals": refusals}) + "\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
