"""Sizes, prompts, channels and patches that each family's tiny model takes or refuses (see ``test_family_limits.py``).

python family_limits.py COMFYUI ROOT FOLDER FAMILY...

FOLDER holds each family's network and prompts, as for ``sampling_families.py``. Written there are ``said.json``, the
errors by case, ``facts.json``, and ``results``, the pictures and latents by case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from boot import boot
from safetensors.torch import load_file, save_file
from sampling_families import SEED, conditioning, load, sample
from torch import Tensor

# (height, width) of the enlarged picture, and tile_size: odd sides, a side of one pixel, tiles below and above each
# family's own limits, tiles larger than the picture.
SIZES = (((600, 616), 320), ((152, 408), 64), ((1, 200), 128), ((96, 472), 512), ((40, 24), 0))
RATIO = 8


def waves(height: int, width: int) -> Tensor:
    """Make a picture (1, H, W, 3) of smooth colours without any symmetry."""
    y, x = torch.arange(height)[:, None] / 90, torch.arange(width)[None, :] / 70
    return torch.stack([0.5 + 0.4 * torch.sin(x + 2 * y), 0.5 + 0.4 * torch.cos(y - x), (x + y).sin() ** 2], -1)[None]


class PatchVAE:
    """A stand-in for a VAE: the mean of each patch, and back."""

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels
        self.latent_dim = 2

    def spacial_compression_encode(self) -> int:
        return RATIO

    spacial_compression_decode = spacial_compression_encode

    def encode(self, pixels: Tensor) -> Tensor:
        latent = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), RATIO)
        return latent.repeat(1, -(-self.latent_channels // 3), 1, 1)[:, : self.latent_channels] * 2 - 1

    def decode(self, latent: Tensor) -> Tensor:
        pixels = torch.sigmoid(latent[:, :3])
        return torch.nn.functional.interpolate(pixels, scale_factor=RATIO).movedim(1, -1)


class Case:
    """One family's model with its prompts, and what the nodes made of it."""

    def __init__(self, family: str, folder: Path, said: dict[str, str], results: dict[str, Tensor]) -> None:
        self.family = family
        self.model = load(family, folder)
        self.given = load_file(folder / f"{family}.given.safetensors")
        self.positive = conditioning(self.given, "positive")
        self.negative = conditioning(self.given, "negative")
        self.picture = self.given["picture"]
        self.said, self.results = said, results

    def empty(self, height: int | None = None, width: int | None = None) -> dict[str, Tensor]:
        """An empty latent, by default of the family's own size."""
        size = self.picture.shape[-2:] if height is None else (height, width)
        return {"samples": torch.zeros(1, self.picture.shape[1], *size)}

    def keep(self, name: str, call: Callable[[], Tensor]) -> None:
        """Keep the result of a call, or its error in words."""
        key = f"{self.family}, {name}"
        try:
            self.results[key] = call().clone()
        except ValueError as error:
            self.said[key] = str(error)

    def upscale(self, size: tuple[int, int], tile: int, model: Any = None, positive: Any = None, **more: Any) -> Tensor:
        """Run Flash Upscale at scale 1 and one step on :func:`waves`."""
        from dropped_in.nodes.picture.upscale import FlashUpscale

        pixels = waves(*size)
        settings = {"seed": 3, "steps": 1, "denoise": 1.0, "guidance": 1.0, "overlap": 0.25, "noise_augmentation": 0.0}
        return FlashUpscale.execute(
            model or self.model,
            PatchVAE(self.picture.shape[1]),
            positive or self.positive,
            pixels,
            1.0,
            tile_size=tile,
            **{**settings, **more},
        ).args[0]


def sizes(case: Case) -> None:
    """Upscale pictures of every kind of size, and sample latents at the family's limits."""
    same = case.model.clone()
    same.set_model_unet_function_wrapper(lambda apply, call: call["input"])
    kept = {"model": same, "grid": "custom", "timesteps": "1"}
    for size, tile in SIZES:
        case.keep(f"upscale {size} in {tile}", lambda size=size, tile=tile: case.upscale(size, tile))
        # A model that keeps its input, without noise at the lowest noise level: the picture comes back.
        with patch("comfy.sample.prepare_noise", lambda latent, *_: torch.zeros_like(latent)):
            case.keep(f"keep {size} in {tile}", lambda size=size, tile=tile: case.upscale(size, tile, **kept))
    for height, width in ((64, 50), (48, 49), (1, 90)):
        latent = case.empty(height, width)
        case.keep(
            f"sample {height} x {width}", lambda latent=latent: sample(case.model, case.positive, latent, steps=1)
        )


def inpaint(case: Case, facts: dict[str, Any]) -> None:
    """Inpaint a thin line in a large picture and in a picture that is a thin line itself: crop, sample, stitch."""
    from dropped_in.nodes.picture.inpaint import FlashInpaintPrepare, FlashInpaintStitch

    vae = PatchVAE(case.picture.shape[1])
    # SD 1.5: its training size. The tiny SD3's position embeddings end at 384 pixels.
    size = 0 if case.family == "sd15" else 128 if case.family.startswith("sd3") else 512
    settings = {"context": 1.5, "grow": 4, "feather": 16, "size": size}
    settings |= {f"pad_{side}": 0 for side in ("left", "top", "right", "bottom")}
    for name, (height, width), rows in (("wide", (1024, 2048), slice(500, 508)), ("line", (24, 1900), slice(8, 16))):
        picture, mask = waves(height, width), torch.zeros(1, height, width)
        mask[:, rows, 100:1850] = 1
        given = {**settings, "image": picture, "mask": mask}
        positive, _, latent, plan, crop, crop_mask = FlashInpaintPrepare.execute(
            case.model, vae, case.positive, **given
        ).args
        drawn = vae.decode(sample(case.model, positive, latent, steps=1))
        after = FlashInpaintStitch.execute(plan, drawn).args[0]
        back = FlashInpaintStitch.execute(plan, crop).args[0]
        facts[f"{case.family}, {name}"] = {
            "crop": crop.shape[1:3],
            "mask": float(crop_mask.mean()),
            "changed": float((after != picture).any(-1)[:, rows, 100:1850].float().mean()),
            "outside": float((after != picture).any(-1)[:, :, :60].float().mean()),
            "back": float((back - picture).abs().max()),
        }
    if case.family == "flux":
        config = case.model.model.model_config.unet_config
        for kind, channels in (("Fill", 16 + 16 + 64), ("Canny", 16 + 16), ("dev", 16)):
            with patch.dict(config, in_channels=channels):
                positive = FlashInpaintPrepare.execute(case.model, vae, case.positive, **given).args[0]
            facts[f"flux {kind}"] = sorted(name for name in positive[0][1] if name.startswith("concat"))
    if size == 128:
        large = {**settings, "size": 1024, "image": picture, "mask": mask}
        case.keep("inpaint, too large", lambda: FlashInpaintPrepare.execute(case.model, vae, case.positive, **large))


def prompts(case: Case) -> None:
    """Give prompts of other models: wide text, another pooled embedding, none."""
    tokens, entries = case.positive[0]
    wide = [[torch.cat([tokens, tokens], -1), entries]]
    case.keep("wide text", lambda: sample(case.model, wide, case.empty(), steps=1))
    if "pooled_output" in entries:
        other = [[tokens, {"pooled_output": entries["pooled_output"][:, :16]}]]
        case.keep("narrow pooled", lambda: sample(case.model, other, case.empty(), steps=1))
        case.keep("no pooled", lambda: sample(case.model, [[tokens, {}]], case.empty(), steps=1))
    brought = [[tokens, {**entries, "noise_concat": torch.zeros(1, 5, *case.picture.shape[-2:])}]]
    case.keep("channels for an ordinary model", lambda: sample(case.model, brought, case.empty(), steps=1))
    case.keep("channels for an ordinary model, upscaled", lambda: case.upscale((64, 64), 64, positive=brought))


def zero_steps(case: Case) -> None:
    """Sample no step at the first and the last of the noise levels, as SplitSigmas gives them; euler beside ours."""
    import comfy.sample
    import comfy.samplers
    from dropped_in.nodes.sampling.few_step import flash_grid, flash_sampler

    sigmas = flash_grid(case.model, 4).sigmas
    for name, split in (("first", sigmas[:1]), ("last", sigmas[4:])):
        for sampler_name, sampler in (("ours", flash_sampler()), ("core", comfy.samplers.sampler_object("euler"))):

            def run(split: Tensor = split, sampler: Any = sampler) -> Tensor:
                noise = comfy.sample.prepare_noise(case.picture, SEED)
                return comfy.sample.sample_custom(
                    case.model, noise, 1.0, sampler, split, case.positive, case.negative, case.picture, seed=SEED
                )

            case.keep(f"no step, {name}, {sampler_name}", run)


def patches(case: Case, facts: dict[str, Any]) -> None:
    """Put ComfyUI's patches on the model that need a negative prompt, or keep values between evaluations."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
    from comfy_extras.nodes_sag import SelfAttentionGuidance
    from dropped_in.nodes.sampling.compare import FlashCompare

    guided = SelfAttentionGuidance.execute(case.model, 0.5, 2.0).args[0]
    empty, size = case.empty(), (192, 192)
    case.keep("SAG", lambda: sample(guided, case.positive, empty, steps=2))
    case.keep("SAG with a negative", lambda: sample(guided, case.positive, empty, steps=2, negative=case.negative))
    case.keep("plain", lambda: sample(case.model, case.positive, empty, steps=2))
    case.keep("SAG, upscale", lambda: case.upscale(size, 512, guided))
    case.keep("SAG, one tile", lambda: case.upscale(size, 512, guided, negative=case.negative))
    case.keep("SAG, tiles", lambda: case.upscale(size, 128, guided, negative=case.negative))
    compared = {"flash_model": guided, "vae": PatchVAE(4), "latent_image": empty, "seed": 1, "teacher_steps": 1}
    compared |= {"teacher_guidance": 1.0, "sampler_name": "euler", "scheduler": "simple", "flash_steps": "1"}
    case.keep(
        "SAG, compare", lambda: FlashCompare.execute(model=case.model, positive=case.positive, **compared).args[0]
    )
    easy = EasyCacheNode.execute(case.model, 3.0, 0.0, 1.0, False).args[0]
    lazy = LazyCacheNode.execute(case.model, 3.0, 0.0, 1.0, False).args[0]
    case.keep("EasyCache, tiles", lambda: case.upscale(size, 128, easy, steps=4))
    case.keep("EasyCache, one tile", lambda: case.upscale(size, 512, easy, steps=4))
    calls: list[int] = []

    def counted_apply(apply: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        calls.append(len(call["input"]))
        return apply(call["input"], call["timestep"], **call["c"])

    counted = lazy.clone()
    counted.set_model_unet_function_wrapper(counted_apply)
    case.keep("LazyCache, tiles", lambda: case.upscale(size, 128, counted, steps=4))
    facts["LazyCache, tiles"] = len(calls)

    class TeaCache:
        def __call__(self, apply: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
            return apply(call["input"], call["timestep"], **call["c"])

    other = case.model.clone()
    other.set_model_unet_function_wrapper(TeaCache())
    case.keep("a cache of another pack, tiles", lambda: case.upscale(size, 128, other))


def main(comfyui: Path, root: Path, folder: Path, *families: str) -> None:
    """Run every case of every family."""
    boot(comfyui, root)
    import comfy.utils

    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    said: dict[str, str] = {}
    results: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    with torch.inference_mode():
        for family in families:
            case = Case(family, folder, said, results)
            sizes(case)
            inpaint(case, facts)
            prompts(case)
            zero_steps(case)
            if family == "sd15":
                patches(case, facts)
    (folder / "said.json").write_text(json.dumps(said))
    (folder / "facts.json").write_text(json.dumps(facts))
    save_file({name: value.contiguous() for name, value in results.items()}, folder / "results")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), *sys.argv[4:])
