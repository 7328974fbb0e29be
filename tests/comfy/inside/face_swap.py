"""Flash Face Swap Prepare on the demo under a task adapter (see ``test_face_swap.py``).

python face_swap.py COMFYUI ROOT FOLDER

FOLDER holds ``face-swap.safetensors``, a task adapter, and ``given.safetensors``, pictures and masks. Written there are
``results`` (what the node makes of them) and ``said.json`` (what it says to what does not fit).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from boot import boot


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Load the demo's face-swap model with its node, then run the cases."""
    boot(comfyui, root)
    import torch
    from dropped_in.nodes.demo import models as demo_models
    from dropped_in.nodes.demo import node as demo
    from dropped_in.nodes.picture.face_swap import NOTICE, FlashFaceSwapPrepare
    from dropped_in.nodes.picture.inpaint import FlashInpaintStitch
    from dropped_in.nodes.sampling.nodes import FlashSampler
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    given = load_file(folder / "given.safetensors")
    target, source, ellipse = given["target"], given["source"], given["ellipse"]
    # The adapter of this test in place of the shipped ones; the node needs nothing but its file.
    demo_models.TASK_ADAPTERS = demo.TASK_ADAPTERS = folder
    with torch.inference_mode():
        assert "face-swap" in demo_models.demo_tasks()
        model, clip, vae = demo.FlashDemoModels.execute("face-swap").args
        plain, _, _ = demo.FlashDemoModels.execute().args
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        settings = {"size": 0, "context": 16.0, "feather": 0, "notice": NOTICE}

        def prepare(**changes: Any) -> Any:
            fixed = {"model": model, "vae": vae, "positive": prompt, "target": target, "source": source}
            return FlashFaceSwapPrepare.execute(**{**fixed, **settings, **changes}).args

        def channels(positive: Any) -> torch.Tensor:
            return positive[0][1]["noise_concat"]

        def swapped(steps: int = 2, guidance: float = 1.0, **changes: Any) -> torch.Tensor:
            positive, negative, latent, stitch, _ = prepare(**changes)
            sampled = FlashSampler.execute(model, positive, latent, 3, steps, guidance, 1.0, negative=negative).args[0]
            return FlashInpaintStitch.execute(stitch, vae.decode(sampled["samples"])).args[0]

        results = {}
        for name, changes in {
            "plain": {"target_mask": ellipse},
            "feathered": {"target_mask": ellipse, "feather": 12},
            "two": {"target": given["targets"], "source": given["sources"], "target_mask": given["masks"]},
            "one source for two": {"target": given["targets"], "target_mask": given["masks"]},
            "framed": {"target_mask": ellipse, "source_mask": ellipse},
            "a transparent target": {"target": torch.cat([target, target[..., :1]], -1), "target_mask": ellipse},
            "a transparent source": {"source": torch.cat([source, source[..., :1]], -1), "target_mask": ellipse},
            "an empty source mask": {"target_mask": ellipse, "source_mask": torch.zeros(1, 64, 64)},
            "a small mask": {"target_mask": ellipse[:, ::2, ::2]},
            "a box": {"target_face": {"x": 26, "y": 19, "width": 77, "height": 90}},
            "faces in a list": {
                "target_face": [
                    [{"x": 2, "y": 3, "width": 5, "height": 5}, {"x": 26, "y": 19, "width": 77, "height": 90}]
                ]
            },
            "an empty mask and a box": {
                "target_mask": torch.zeros(1, 64, 64),
                "target_face": [{"x": 26, "y": 19, "width": 77, "height": 90}],
            },
            "a source's box": {"target_mask": ellipse, "source_face": {"x": 26, "y": 19, "width": 77, "height": 90}},
            "one pixel": {"target": target[:, :1, :1], "target_mask": torch.ones(1, 1, 1)},
            "a source of one pixel": {"source": source[:, :1, :1], "target_mask": ellipse},
        }.items():
            positive, negative, latent, _, identity = prepare(**changes)
            results |= {
                f"{name}.positive": channels(positive),
                f"{name}.negative": channels(negative),
                f"{name}.noise_mask": latent["noise_mask"],
                f"{name}.identity": identity,
            }
        results["picture"] = swapped(target_mask=ellipse, context=1.5, feather=6)
        results["guided"] = swapped(target_mask=ellipse, context=1.5, feather=6, guidance=2.0)
        results["another source"] = swapped(target_mask=ellipse, context=1.5, feather=6, source=given["sources"][1:])
        results["transparent picture"] = swapped(target=torch.cat([target, target[..., :1]], -1), target_mask=ellipse)
        large = torch.nn.functional.interpolate(target.movedim(-1, 1), (2400, 3200), mode="nearest").movedim(1, -1)
        small_face = torch.zeros(1, 2400, 3200)
        small_face[:, 1000:1400, 900:1200] = 1
        results["large target"], results["large"] = large, swapped(target=large, target_mask=small_face, steps=1)

        said = {}
        wide = torch.zeros(1, 64, 128)
        wide[:, :9] = 1
        for name, changes in {
            "no mask": {},
            "an empty mask": {"target_mask": torch.zeros(1, 128, 128)},
            "a nearly empty mask": {"target_mask": torch.full((1, 128, 128), 0.2)},
            "a mask of another shape": {"target_mask": wide},
            "a source mask of another shape": {"target_mask": ellipse, "source_mask": wide},
            "three masks for two": {"target": given["targets"], "target_mask": ellipse.repeat(3, 1, 1)},
            "three sources for two": {
                "target": given["targets"],
                "target_mask": ellipse,
                "source": source.repeat(3, 1, 1, 1),
            },
            "two sources for one": {"source": given["sources"], "target_mask": ellipse},
            "no face found": {"target_face": [[]]},
            "faces of three pictures": {"target": given["targets"], "target_face": [[], [], []]},
            "a face outside": {"target_face": {"x": 500, "y": 500, "width": 20, "height": 20}},
            "a model of text alone": {"model": plain, "target_mask": ellipse},
            "an inpainting model": {"model": inpainting_model(demo_models), "target_mask": ellipse},
            "a transformer": {"model": transformer(), "target_mask": ellipse},
            "no prompt": {"positive": [], "target_mask": ellipse},
            "a prompt of another model": {"positive": [[torch.zeros(1, 7, 768), {}]], "target_mask": ellipse},
            "a broken target": {"target": target / 0, "target_mask": ellipse},
            "a broken source": {"source": source / 0, "target_mask": ellipse},
            "a broken mask": {"target_mask": ellipse / 0},
            "a grey source": {"source": source[..., :1], "target_mask": ellipse},
            "another notice": {"notice": "", "target_mask": ellipse},
            "another VAE": {"vae": OtherVAE(), "target_mask": ellipse},
        }.items():
            try:
                prepare(**changes)
            except ValueError as error:
                said[name] = str(error)
    save_file({name: value.float().contiguous() for name, value in results.items()}, folder / "results")
    (folder / "said.json").write_text(json.dumps(said))


class OtherVAE:
    """A stand-in for a VAE with Stable Diffusion's latents."""

    latent_channels = 4


def inpainting_model(demo_models: Any) -> Any:
    """Build the demo's model with a mask and one picture as further channels."""
    import torch
    from dropped_in.flash_core.task_adapter import TaskAdapter

    adapter = TaskAdapter("inpainting", torch.zeros(64, 17, 3, 3), {})
    return demo_models.build_model(demo_models.TEACHER, torch.zeros(17, 3), adapter)


def transformer() -> Any:
    """Build a transformer with the demo's 16 latent channels: SD3's configuration without weights."""
    from types import SimpleNamespace

    import comfy.latent_formats

    config = SimpleNamespace(unet_config={"in_channels": 16, "depth": 24})
    return SimpleNamespace(
        model=SimpleNamespace(model_config=config), get_model_object=lambda name: comfy.latent_formats.SD3()
    )


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
