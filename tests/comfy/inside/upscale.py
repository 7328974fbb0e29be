"""Tiled upscaling in ComfyUI's process (see ``test_upscale.py``).

python upscale.py COMFYUI ROOT GIVEN RESULTS

GIVEN is a safetensors file with the weights of a tiny x4 upscaler ("x4.*") and its prompt; RESULTS gets what the node
made, with what it is to be compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from boot import boot
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TILE, OVERLAP = 128, 0.25  # pixels; the demo's own size
SETTINGS = {"seed": 9, "steps": 4, "guidance": 1.0, "overlap": OVERLAP, "noise_augmentation": 0.0}


def waves(height: int, width: int) -> Tensor:
    """Smooth colours, without any edge."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    red, green = 0.5 + 0.3 * torch.sin(3 * x + 2 * y), 0.5 + 0.3 * torch.cos(4 * y)
    return torch.stack([red, green, 0.4 + 0.3 * x], -1)[None]


class PatchVAE:
    """A stand-in for a VAE: the mean of each patch, and back. So the picture shows the sampled latent directly."""

    def __init__(self, ratio: int, channels: int = 4) -> None:
        self.ratio, self.latent_channels = ratio, channels

    def spacial_compression_encode(self) -> int:
        return self.ratio

    spacial_compression_decode = spacial_compression_encode

    def encode(self, pixels: Tensor) -> Tensor:
        latent = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), self.ratio)
        return torch.cat([latent, latent[:, :1]], 1) * 2 - 1

    def decode(self, latent: Tensor) -> Tensor:
        pixels = torch.sigmoid(latent[:, :3] / 8)
        return torch.nn.functional.interpolate(pixels, scale_factor=self.ratio).movedim(1, -1)


class Results(dict[str, Tensor]):
    """The results for the file."""

    def run(self, name: str, *arguments: Any, **settings: Any) -> Tensor:
        """Run the node and keep its picture under a name."""
        from dropped_in.nodes.picture.upscale import FlashUpscale

        self[name] = FlashUpscale.execute(*arguments, **{**SETTINGS, **settings}).args[0].clone()
        return self[name]

    def refuse(self, name: str, *arguments: Any, **settings: Any) -> None:
        """Keep the node's error as bytes."""
        try:
            self.run(name, *arguments, **settings)
        except ValueError as error:
            self[name] = torch.tensor(list(str(error).encode()), dtype=torch.uint8)


def demo(results: Results) -> None:
    """Upscale in one tile and with the ordinary sampler, and in several tiles to measure seams."""
    import comfy.sample
    import comfy.samplers
    from dropped_in.flash_core.image import plan_tiles
    from dropped_in.nodes.demo.models import build_demo
    from dropped_in.nodes.lora.loader import FlashLoraLoader
    from dropped_in.nodes.sampling.few_step import flash_grid, flash_sampler
    from dropped_in.nodes.sampling.nodes import FlashSampler

    teacher, clip, vae = build_demo()
    model = FlashLoraLoader.execute(teacher, "flash_demo.safetensors", 1.0).args[0]
    prompt, empty = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("red apple", ""))

    pictures = torch.cat([waves(96, 128), waves(96, 128).flip(1)])
    for denoise in (0.25, 1.0):
        latent = {"samples": vae.encode(pictures)}
        sampled = FlashSampler.execute(model, prompt, latent, 9, 4, 1.0, denoise).args[0]["samples"]
        results[f"whole.{denoise}"] = torch.cat([vae.decode(item[None]) for item in sampled])
        results.run(f"one.{denoise}", model, vae, prompt, pictures, scale=1.0, denoise=denoise, tile_size=512)

    picture = waves(256, 256)
    given = (model, vae, empty, picture)
    settings = {"scale": 1.0, "steps": 8, "tile_size": TILE}  # 8 steps have the timesteps 249 and 124
    results.run("blended", *given, **settings, denoise=0.25)
    results.run("unblended", *given, **settings, denoise=0.25, overlap=0.0)

    # The same overlapping tiles, each sampled to its end on its own and cut where the next one's weights are larger.
    latent = vae.encode(picture)
    noise = comfy.sample.prepare_noise(latent, 9)
    tiles = plan_tiles(*latent.shape[-2:], TILE // 8, round(TILE // 8 * OVERLAP))
    cut, largest = torch.zeros_like(latent), torch.zeros(latent.shape[-2:])
    for index in range(len(tiles)):
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": empty})
        parts = [tiles.take(whole, index).contiguous() for whole in (noise, latent)]
        part = guider.sample(*parts, flash_sampler(), flash_grid(model, 8, 0.25).sigmas, seed=9, disable_pbar=True)
        stronger = tiles.weight(index) > tiles.take(largest, index)
        tiles.take(cut, index).copy_(torch.where(stronger, part, tiles.take(cut, index)))
        tiles.take(largest, index).copy_(torch.maximum(tiles.weight(index), tiles.take(largest, index)))
    results["cut"] = vae.decode(cut)
    results["starts"] = torch.tensor(tiles.lefts)

    round_trip(results, model, vae)
    pointwise(results, model, clip)
    too_large(results, model, vae, prompt)


def round_trip(results: Results, model: Any, vae: Any) -> None:
    """Encode and decode a picture in the VAE's tiles, and as a whole."""
    from dropped_in.nodes.picture.tiled import decode_tiled, encode_tiled
    from dropped_in.nodes.picture.upscale import plan

    picture = waves(576, 576)
    results["vae.whole"] = vae.decode(vae.encode(picture))
    _, tiles = plan(model, vae, picture, 1.0, 0, OVERLAP)
    latent = torch.zeros(1, vae.latent_channels, tiles.height, tiles.width)
    encode_tiled(vae, picture, tiles, latent, lambda: None)
    results["vae.tiled"] = torch.empty_like(picture)
    decode_tiled(vae, latent, tiles, results["vae.tiled"], lambda: None)
    results["vae.starts"] = torch.tensor(tiles.lefts)


def pointwise(results: Results, model: Any, clip: Any) -> None:
    """Upscale with a model that sees one position at a time: tiles must not change its result, for any prompt."""
    import nodes as core_nodes

    def answer(apply: Callable[..., Tensor], call: dict[str, Any]) -> Tensor:
        conditions = call["c"]
        text = conditions["c_crossattn"].mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        control = conditions.get("control")
        hint = control["output"][0][:, :1] if control else 0.0
        return torch.tanh(call["input"]) + 9 * text + hint

    model = model.clone()
    model.set_model_unet_function_wrapper(answer)
    first, second = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("red apple", "a blue car"))
    mask = torch.zeros(1, 40, 56)
    mask[:, 10:30, 20:] = 0.7
    masked = core_nodes.ConditioningSetMask().append(first, mask, "default", 1.0)[0] + second
    hint = torch.rand(1, 3, 320, 448, generator=torch.Generator().manual_seed(0))
    hinted = [[tokens, {**entries, "control": PatchControl.with_hint(hint)}] for tokens, entries in first]
    vae = PatchVAE(8, model.get_model_object("latent_format").latent_channels)
    vae.encode = lambda pixels: torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)[:, [0, 1, 2, 0] * 4][
        :, : vae.latent_channels
    ]
    for name, positive in (("masked", masked), ("hinted", hinted)):
        for size in (512, 128):
            settings = {"scale": 2.0, "denoise": 1.0, "tile_size": size, "guidance": 2.0, "negative": second}
            results.run(f"{name}.{size}", model, vae, positive, waves(160, 224), **settings)


class PatchControl:
    """A ControlNet whose network is the mean of each patch of its hint."""

    @staticmethod
    def with_hint(hint: Tensor) -> Any:
        import comfy.controlnet

        class Network(torch.nn.Module):
            dtype = torch.float32

            def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, **_: Any) -> Any:
                return {"output": [torch.nn.functional.avg_pool2d(hint, 8)]}

        cpu = torch.device("cpu")
        return comfy.controlnet.ControlNet(Network(), load_device=cpu).set_cond_hint(hint)


def x4(results: Results, given: Path) -> None:
    """Record the inputs of the x4 upscaler's network, in one tile and in several."""
    import comfy.model_patcher
    import comfy.supported_models
    import tiny

    with safe_open(given, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        weights = {key.removeprefix("x4."): file.get_tensor(key) for key in file.keys() if key.startswith("x4.")}  # noqa: SIM118
        tokens, picture = file.get_tensor("tokens"), file.get_tensor("picture")
    labels = weights.pop("class_embedding.weight")
    sizes, native = tiny._unet("sd21", weights, config)
    sizes |= {"num_classes": len(labels), "disable_self_attentions": config["only_cross_attention"]}
    model_config = comfy.supported_models.SD_X4Upscaler(sizes)
    model_config.unet_config.update(sizes)
    model_config.set_inference_dtype(torch.float32, None)
    inner = model_config.get_model(native, "")
    inner.load_model_weights({**native, "label_emb.weight": labels}, "")
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(inner.eval(), cpu, cpu)

    seen: list[tuple[Tensor, Tensor]] = []
    inner.diffusion_model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append((arguments[0][:, 4:].clone(), named["y"])), with_kwargs=True
    )
    prompt = [[tokens, {}]]
    common = {"scale": 4.0, "denoise": 0.25}
    results.run("x4.one", model, PatchVAE(4), prompt, picture, **common, tile_size=512)
    seen.clear()
    results.run("x4.tiled", model, PatchVAE(4), prompt, picture, **common, tile_size=64, steps=1)
    results["x4.seen"] = torch.cat([channels for channels, _ in seen])
    seen.clear()
    results.run(
        "x4.noised", model, PatchVAE(4), prompt, picture, **common, tile_size=64, steps=1, noise_augmentation=0.057
    )
    results["x4.noised.seen"] = torch.cat([channels for channels, _ in seen])
    results["x4.levels"] = torch.cat([level for _, level in seen])
    attached = [[tokens, {"concat_image": torch.zeros(1, 4, 24, 40)}]]
    results.refuse("x4.attached", model, PatchVAE(4), attached, picture, **common, tile_size=64)
    results.refuse("x4.vae", model, PatchVAE(8), prompt, picture, **common, tile_size=64)

    for channels in (7, 8, 6):
        plain = comfy.supported_models.SD15({**sizes, "num_classes": None, "in_channels": channels})
        plain.unet_config.update(sizes, num_classes=None, in_channels=channels)
        plain.set_inference_dtype(torch.float32, None)
        concat = plain.get_model({}, "")
        for weight in concat.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        inputs: list[Tensor] = []
        concat.diffusion_model.register_forward_pre_hook(
            lambda module, arguments, inputs=inputs: inputs.append(arguments[0][:, 4:].clone())
        )
        model = comfy.model_patcher.ModelPatcher(concat, cpu, cpu)
        call = results.refuse if channels == 6 else results.run
        call(f"concat.{channels}", model, PatchVAE(8), prompt, picture, **common, tile_size=64, steps=1)
        if channels == 8:
            attached = [[tokens, {"noise_concat": torch.zeros(1, 4, 3, 5)}]]
            results.refuse("concat.attached", model, PatchVAE(8), attached, picture, **common, tile_size=64)
        if inputs:
            results[f"concat.{channels}.seen"] = torch.cat(inputs)


def too_large(results: Results, model: Any, vae: Any, prompt: Any) -> None:
    """Try a picture whose result no machine can hold, without allocating the picture."""
    picture = torch.zeros(1, 1, 1, 3).expand(1, 400_000, 300_000, 3)
    results.refuse("too_large", model, vae, prompt, picture, scale=8.0, denoise=0.25, tile_size=0)


def areas(results: Results) -> None:
    """Cut a prompt's area to tiles, and record the size that a model gets."""
    from dropped_in.flash_core.image import Box, plan_tiles
    from dropped_in.nodes.picture.tiled import Cut
    from dropped_in.nodes.picture.upscale import with_tile_size

    cut = Cut(Box(16, 8, 16, 16), (64, 64), 0, 1, {})
    inside, apart = cut.area([10, 40, 20, 4]), cut.area([4, 4, 0, 0])
    results["area"] = torch.tensor(inside)
    results["area.apart"] = torch.tensor(apart is None)
    kept = cut.prompt([{"area": [4, 4, 0, 0], "model_conds": {}}, {"model_conds": {}}])
    results["area.kept"] = torch.tensor(len(kept))
    ((_, told),) = with_tile_size([[None, {"height": 300}]], plan_tiles(64, 96, 32, 8))
    results["told"] = torch.tensor([told["width"], told["height"]])


def main(comfyui: Path, root: Path, given: Path, outputs: Path) -> None:
    """Run everything as ComfyUI runs nodes: without gradients. There is no server."""
    boot(comfyui, root)
    import comfy.utils
    import folder_paths
    from dropped_in.nodes.demo.models import SHIPPED_LORAS

    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder_paths.add_model_folder_path("loras", str(SHIPPED_LORAS))
    results = Results()
    with torch.inference_mode():
        demo(results)
        x4(results, given)
        areas(results)
    save_file({name: value.contiguous() for name, value in results.items()}, outputs)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
