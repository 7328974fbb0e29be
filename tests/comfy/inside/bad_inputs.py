"""Give each node on the demo the mistakes of a user (see ``test_bad_inputs.py``).

python bad_inputs.py COMFYUI ROOT FOLDER

FOLDER holds ``sd15.safetensors`` and ``sd15.json``, a tiny model of another family. Written there are ``said.json``,
what was refused in which words, ``results``, what the rest made with what it should be (", expected"), and
``schemas.json``: each node's inputs and their types.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from boot import boot
from safetensors.torch import save_file
from sampling_families import load
from torch import Tensor

SIDE = 128  # the demo's pictures, in pixels; an eighth of it in its latents
LORA = "flash_demo.safetensors"
NAN = float("nan")


class Given:
    """The nodes' inputs in a case without a mistake."""

    def __init__(self, folder: Path) -> None:
        import folder_paths
        from dropped_in.nodes.demo.models import SHIPPED_LORAS, TASK_ADAPTERS, build_demo
        from dropped_in.nodes.lora.loader import FlashLoraLoader

        folder_paths.add_model_folder_path("loras", str(SHIPPED_LORAS))
        self.teacher, clip, self.vae = build_demo()
        self.model = FlashLoraLoader.execute(self.teacher, LORA, 1.0).args[0]
        self.concat, _, _ = build_demo(adapter=TASK_ADAPTERS / "inpainting.safetensors")
        self.face_swap, _, _ = build_demo(adapter=TASK_ADAPTERS / "face-swap.safetensors")
        self.other = load("sd15", folder)
        self.prompt = clip.encode_from_tokens_scheduled(clip.tokenize("red apple"))
        generator = torch.Generator().manual_seed(1)
        self.image = torch.rand(1, SIDE, SIDE, 3, generator=generator)
        self.mask = torch.zeros(1, SIDE, SIDE)
        self.mask[:, 32:96, 48:88] = 1
        self.latent = self.vae.encode(self.image)

    def plain(self) -> dict[str, Any]:
        """An empty latent."""
        return {"samples": torch.zeros_like(self.latent)}

    def masked(self, mask: Tensor) -> dict[str, Any]:
        """The picture's latent with a noise mask."""
        return {"samples": self.latent, "noise_mask": mask}

    def transparent(self) -> Tensor:
        """The picture with an alpha channel that is not 1."""
        return torch.cat([self.image, self.image[..., :1]], -1)

    def large(self) -> Tensor:
        """The picture 24 times as wide and high."""
        return self.image.repeat_interleave(24, 1).repeat_interleave(24, 2)


class OtherVAE:
    """A stand-in for the VAE of another model, with the attributes that nodes read."""

    latent_channels = 4


Case = Callable[[], Tensor] | tuple[Callable[[], Tensor], Callable[[], Tensor]]


def sampler_cases(given: Given) -> dict[str, Case]:
    """List the cases of Flash Sampler, Flash Scheduler and Flash Sampler Select."""
    from dropped_in.nodes.sampling.nodes import FlashSampler, FlashSamplerSelect, FlashScheduler

    def run(latent: Any = None, **changes: Any) -> Tensor:
        values = {"model": given.model, "positive": given.prompt, "latent_image": latent or given.plain()}
        values |= {"seed": 3, "steps": 2, "guidance": 1.0, "denoise": 1.0, **changes}
        return FlashSampler.execute(**values).args[0]["samples"]

    two = {"samples": given.latent.repeat(2, 1, 1, 1)}
    three = torch.cat([given.mask, 1 - given.mask, given.mask])[:, None]
    tokens = given.prompt[0][0]
    sampler = "FlashSampler, "
    return {
        f"{sampler}mask of another size": (lambda: run(given.masked(torch.ones(1, 1, 33, 60))), run),
        f"{sampler}empty mask": (lambda: run(given.masked(torch.zeros(1, 1, SIDE, SIDE))), lambda: given.latent),
        f"{sampler}batch mismatch": (
            lambda: run({**two, "noise_mask": three}),
            lambda: run({**two, "noise_mask": three[:2]}),
        ),
        f"{sampler}one pixel": lambda: run({"samples": torch.zeros(1, 16, 1, 1)}),
        f"{sampler}wrong model family": lambda: run(model=given.other),
        f"{sampler}wrong model family: further channels": lambda: run(model=given.face_swap),
        f"{sampler}wrong model family: channels of another size": lambda: run(
            model=given.face_swap, positive=[[tokens, {"noise_concat": torch.zeros(1, 33, 8, 8)}]]
        ),
        f"{sampler}NaN": lambda: run({"samples": given.latent * NAN}),
        f"{sampler}NaN: mask": lambda: run(given.masked(given.mask[:, None] * NAN)),
        f"{sampler}no prompts": lambda: run(positive=[]),
        f"{sampler}no prompts: negative": lambda: run(negative=[], guidance=2.0),
        f"{sampler}video latent": lambda: run({"samples": given.latent[:, :, None]}),
        f"{sampler}latent of another model": lambda: run({"samples": given.latent[:, :4]}),
        f"{sampler}latent of another model: empty": (lambda: run({"samples": torch.zeros(1, 4, 16, 16)}), run),
        f"{sampler}denoise 0": lambda: run(denoise=0.0),
        f"{sampler}stochasticity 2": lambda: run(stochasticity=2.0),
        "FlashScheduler, denoise 0": lambda: FlashScheduler.execute(given.model, 4, 0.0).args[0],
        "FlashSamplerSelect, stochasticity 2": lambda: FlashSamplerSelect.execute(2.0).args[0],
    }


def compare_cases(given: Given) -> dict[str, Case]:
    """List the cases of Flash Compare; its grid shows seconds, so tests only check that there is a grid."""
    from dropped_in.nodes.sampling.compare import FlashCompare

    def run(latent: Any = None, **changes: Any) -> Tensor:
        values = {"model": given.teacher, "flash_model": given.model, "positive": given.prompt, "vae": given.vae}
        values |= {"latent_image": latent or given.plain(), "seed": 3, "teacher_steps": 1, "teacher_guidance": 1.0}
        values |= {"sampler_name": "euler", "scheduler": "simple", "flash_steps": "1", **changes}
        return FlashCompare.execute(**values).args[0]

    compare = "FlashCompare, "
    return {
        f"{compare}empty mask": lambda: run(given.masked(torch.zeros(1, 1, SIDE, SIDE))),
        f"{compare}batch mismatch": lambda: run(given.masked(torch.ones(3, 1, SIDE, SIDE))),
        f"{compare}one pixel": lambda: run({"samples": torch.zeros(1, 16, 1, 1)}),
        f"{compare}wrong model family": lambda: run(positive=[[torch.zeros(1, 7, 768), {}]]),
        f"{compare}wrong model family: further channels": lambda: run(
            model=given.face_swap, flash_model=given.face_swap
        ),
        f"{compare}NaN": lambda: run({"samples": given.latent * NAN}),
        f"{compare}no prompts": lambda: run(positive=[]),
    }


def inpaint_cases(given: Given) -> dict[str, Case]:
    """List the cases of Flash Inpaint Prepare and Flash Inpaint Stitch."""
    from dropped_in.nodes.picture.inpaint import FlashInpaintPrepare, FlashInpaintStitch

    def run(**changes: Any) -> Any:
        values = {"model": given.model, "vae": given.vae, "positive": given.prompt, "image": given.image}
        values |= {"mask": given.mask, "size": 0, "context": 1.5, "grow": 0, "feather": 8}
        values |= {f"pad_{side}": 0 for side in ("left", "top", "right", "bottom")}
        return FlashInpaintPrepare.execute(**{**values, **changes}).args

    def stitch(image: Tensor, mask: Tensor | None = None) -> Tensor:
        return FlashInpaintStitch.execute(run()[3], image, mask=mask).args[0]

    spot = torch.zeros(1, 24 * SIDE, 24 * SIDE)
    spot[:, 1000:1100, 2000:2100] = 1
    prepare, stitched = "FlashInpaintPrepare, ", "FlashInpaintStitch, "
    return {
        f"{prepare}huge": lambda: run(image=given.large(), mask=spot)[4],
        f"{prepare}wrong model family": lambda: run(positive=[[torch.zeros(1, 7, 768), {}]]),
        f"{prepare}VAE of another model": lambda: run(model=given.other),
        f"{prepare}NaN": lambda: run(image=given.image * NAN),
        f"{prepare}NaN: mask": lambda: run(mask=given.mask * NAN),
        f"{prepare}no prompts": lambda: run(positive=[]),
        f"{prepare}no prompts: negative": lambda: run(negative=[]),
        f"{prepare}one channel": lambda: run(image=given.image[..., :1]),
        f"{stitched}RGBA": (lambda: stitch(given.transparent()), lambda: stitch(given.image)),
        f"{stitched}one pixel": (
            lambda: stitch(given.image[:, :1, :1]),
            lambda: stitch(given.image[:, :1, :1].expand_as(given.image)),
        ),
        f"{stitched}huge": lambda: stitch(given.large()),
        f"{stitched}NaN": lambda: stitch(given.image * NAN),
        f"{stitched}NaN: mask": lambda: stitch(given.image, given.mask * NAN),
        f"{stitched}mask of another size": lambda: stitch(given.image, torch.ones(1, SIDE, 2 * SIDE)),
    }


def concat_cases(given: Given) -> dict[str, Case]:
    """List the cases of Flash Concat Conditioning on the demo's inpainting model (mask, picture's latent)."""
    from dropped_in.nodes.picture.concat import FlashConcatConditioning

    def run(**changes: Any) -> Tensor:
        values = {"model": given.concat, "positive": given.prompt, "latent_image": given.plain(), "vae": given.vae}
        values |= {"order": "mask, image", "images_as": "latent", "mask": given.mask, "image": given.image, **changes}
        return FlashConcatConditioning.execute(**values).args[0][0][1]["noise_concat"]

    concat = "FlashConcatConditioning, "
    return {
        f"{concat}mask of another size": (lambda: run(mask=given.mask[:, ::2, ::2]), run),
        f"{concat}mask of another size: shape": lambda: run(mask=given.mask[:, :64]),
        f"{concat}empty mask": (
            lambda: run(mask=torch.zeros(1, 64, 64))[:, :1],
            lambda: torch.zeros(1, 1, 16, 16),
        ),
        f"{concat}RGBA": (lambda: run(image=given.transparent()), run),
        f"{concat}one pixel": (
            lambda: run(image=given.image[:, :1, :1]),
            lambda: run(image=given.image[:, :1, :1].expand_as(given.image)),
        ),
        f"{concat}huge": lambda: run(image=given.large()),
        f"{concat}VAE of another model": lambda: run(vae=OtherVAE()),
        f"{concat}NaN": lambda: run(image=given.image * NAN),
        f"{concat}NaN: mask": lambda: run(mask=given.mask * NAN),
        f"{concat}NaN: latent": lambda: run(order="mask, latent", image=None, latent={"samples": given.latent * NAN}),
        f"{concat}no prompts": lambda: run(positive=[]),
        f"{concat}video latent": lambda: run(latent_image={"samples": given.latent[:, :, None]}),
        f"{concat}latent of another model": lambda: run(latent_image={"samples": given.latent[:, :4]}),
    }


def upscale_cases(given: Given) -> dict[str, Case]:
    """Flash Upscale."""
    from dropped_in.nodes.picture.upscale import FlashUpscale

    def run(**changes: Any) -> Tensor:
        values = {"model": given.model, "vae": given.vae, "positive": given.prompt, "image": given.image, "scale": 1.0}
        values |= {"seed": 3, "steps": 4, "denoise": 0.25, "guidance": 1.0, "tile_size": 0, "overlap": 0.25}
        return FlashUpscale.execute(**{**values, "noise_augmentation": 0.0, **changes}).args[0]

    upscale = "FlashUpscale, "
    return {
        f"{upscale}wrong model family": lambda: run(positive=[[torch.zeros(1, 7, 768), {}]]),
        f"{upscale}NaN": lambda: run(image=given.image * NAN),
        f"{upscale}no prompts": lambda: run(positive=[]),
        f"{upscale}no prompts: negative": lambda: run(negative=[]),
        f"{upscale}denoise 0": lambda: run(denoise=0.0),
        f"{upscale}one channel": lambda: run(image=given.image[..., :1]),
    }


def lora_cases(given: Given) -> dict[str, Case]:
    """List the cases of Flash LoRA Loader and Flash LoRA Stack."""
    from dropped_in.nodes.lora.loader import FlashLoraLoader
    from dropped_in.nodes.lora.stack import FlashLoraStack

    return {
        "FlashLoraLoader, wrong model family": lambda: FlashLoraLoader.execute(given.other, LORA, 1.0),
        "FlashLoraLoader, a second Flash LoRA": lambda: FlashLoraLoader.execute(given.model, LORA, 1.0),
        "FlashLoraStack, a second Flash LoRA": lambda: FlashLoraStack.execute(given.model, LORA, 1.0),
        "FlashLoraStack, wrong model family": lambda: FlashLoraStack.execute(given.other, LORA, 1.0),
    }


def distil_cases(given: Given) -> dict[str, Case]:
    """List the cases of Flash Distill and Flash Save LoRA."""
    from dropped_in.nodes.distil.lora_output import FlashLora, FlashSaveLora
    from dropped_in.nodes.distil.nodes import FlashDistill

    def run(latent: Tensor | None = None, **changes: Any) -> Tensor:
        values = {"model": given.teacher, "positive": given.prompt, "negative": given.prompt, "prompts": ""}
        values |= {"latents": {"samples": given.latent[..., :8, :8] if latent is None else latent}}
        values |= {"name": "bad", "preset": "quick try", "width": 0, "height": 0, "guidance": 0.0, "seed": 0}
        values |= {"updates": 1, "samples": 1, "teacher_steps": 4, "preview_every": 0, **changes}
        return FlashDistill.train(**values).args[2]

    two = [*given.prompt, *given.prompt]
    area = [[given.prompt[0][0], {**given.prompt[0][1], "area": (8, 8, 0, 0)}]]
    lora = FlashLora({}, {}, "bad")
    distil, save = "FlashDistill, ", "FlashSaveLora, "
    return {
        f"{distil}batch mismatch": lambda: run(given.latent.repeat(3, 1, 1, 1), positive=two),
        f"{distil}one pixel": lambda: run(torch.zeros(1, 16, 1, 1)),
        f"{distil}NaN": lambda: run(given.latent * NAN),
        f"{distil}no prompts": lambda: run(positive=[]),
        f"{distil}no prompts: negative": lambda: run(negative=[]),
        f"{distil}no prompts: text": lambda: run(positive=None, prompts=" \n "),
        f"{distil}no prompts: no CLIP": lambda: run(positive=None, prompts="red apple"),
        f"{distil}wrong model family": lambda: run(positive=[[torch.zeros(1, 7, 768), {}]]),
        f"{distil}wrong model family: further channels": lambda: run(model=given.face_swap),
        f"{distil}a second Flash LoRA": lambda: run(model=given.model),
        f"{distil}VAE of another model": lambda: run(vae=OtherVAE()),
        f"{distil}video latent": lambda: run(given.latent[:, :, None]),
        f"{distil}latent of another model": lambda: run(given.latent[:, :4]),
        f"{distil}teacher_steps 6": lambda: run(teacher_steps=6),
        f"{distil}an area in a prompt": lambda: run(positive=area),
        f"{save}LoRA of another node": lambda: FlashSaveLora.execute({}, "lora"),
        f"{save}a name that leads out": lambda: FlashSaveLora.execute(lora, "../lora"),
        f"{save}a name that is a path": lambda: FlashSaveLora.execute(lora, "/tmp/lora"),
        f"{save}an empty name": lambda: FlashSaveLora.execute(lora, ""),
    }


def evaluate_cases(given: Given) -> dict[str, Case]:
    """List the cases of Flash Evaluate."""
    from dropped_in.nodes.evaluate.node import FlashEvaluate

    def run(**changes: Any) -> Tensor:
        values = {"model": given.teacher, "flash_model": given.model, "vae": given.vae, "prompts": "", "per_prompt": 8}
        values |= {"positive": given.prompt, "negative": given.prompt, "flash_steps": "1", "seed": 3, **changes}
        return FlashEvaluate.execute(**values).args[0]

    evaluate = "FlashEvaluate, "
    return {
        f"{evaluate}no prompts": lambda: run(positive=[]),
        f"{evaluate}no prompts: text": lambda: run(positive=None, prompts=" \n "),
        f"{evaluate}too few pictures": lambda: run(per_prompt=4),
        f"{evaluate}wrong model family": lambda: run(flash_model=given.other),
        f"{evaluate}wrong model family: text": lambda: run(positive=[[torch.zeros(1, 7, 768), {}]]),
        f"{evaluate}wrong model family: further channels": lambda: run(
            model=given.face_swap, flash_model=given.face_swap
        ),
        f"{evaluate}VAE of another model": lambda: run(vae=OtherVAE()),
        f"{evaluate}9 steps": lambda: run(flash_steps="1, 9"),
    }


def main(comfyui: Path, root: Path, folder: Path) -> None:
    """Run every case of every node."""
    boot(comfyui, root)
    import comfy.utils
    import folder_paths
    from dropped_in.nodes import NODES

    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder_paths.set_output_directory(str(folder / "output"))
    said: dict[str, str] = {}
    results: dict[str, Tensor] = {}
    with torch.inference_mode():
        given = Given(folder)
        for cases in (
            sampler_cases,
            compare_cases,
            inpaint_cases,
            concat_cases,
            upscale_cases,
            lora_cases,
            distil_cases,
            evaluate_cases,
        ):
            for name, case in cases(given).items():
                call, expected = case if isinstance(case, tuple) else (case, None)
                try:
                    results[name] = call()
                except ValueError as error:
                    said[name] = str(error)
                if expected is not None:
                    results[f"{name}, expected"] = expected()
    schemas = {
        schema.node_id: {field.id: field.get_io_type() for field in schema.inputs}
        for schema in (node.define_schema() for node in NODES)
    }
    (folder / "said.json").write_text(json.dumps(said))
    (folder / "schemas.json").write_text(json.dumps(schemas))
    save_file({name: value.clone().contiguous() for name, value in results.items()}, folder / "results")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
