"""Flash Upscale: few-step upscaling in tiles, with ordinary models and with super-resolution models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import comfy.model_base
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.image import Tiling, plan_tiles, resize
from ..sampling.few_step import flash_grid, flash_sampler, grid_transitions, text_on_node
from ..sampling.presets import guidance_warnings
from ..shared.inputs import (
    AUTO,
    GridName,
    check_guidance,
    check_numbers,
    check_picture,
    check_unconditional,
    denoise_input,
    grid_inputs,
    guidance_input,
    negative_input,
    preset_input,
    seed_input,
    steps_input,
)
from ..shared.model_facts import CONCAT_KEY, check_makes_pictures, check_vae, native_side
from ..shared.prompts import check_channels, check_prompts
from ..shared.schema import advanced, count, node_schema, show_text
from ..shared.sizes import latent_sizes
from .tile_patches import check_tileable
from .tiled import decode_tiled, encode_tiled, tiled_model, with_tile_size

MAX_SCALE = 8
MAX_OVERLAP = 0.5
LEAST_TILE = 64  # pixels
VAE_TILE = 512  # pixels; the VAE's tiles are at least this large
VAE_OVERLAP = 0.25
PICTURE_CHANNELS = 3
X4_RATIO = 4  # pixels for each latent position of the x4 upscaler
SPARE = 2  # memory in units of the result: the result, and the same again to resize and for the next nodes


class FlashUpscale(io.ComfyNode):
    """Enlarge pictures in tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="image",
            node_id="FlashUpscale",
            display_name="Flash Upscale",
            search_aliases=[
                "upscaler",
                "tiled upscale",
                "ultimate sd upscale",
                "enlarge",
                "super-resolution",
                "hires fix",
                "flash diffusion",
            ],
            description="Enlarge pictures of any size in few steps: in tiles that are blended at every step, without "
            "seams.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model with its Flash LoRA. Ordinary models redraw the details; super-resolution "
                    "models read the small picture as further channels.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt for every tile. Describe material and style rather than single objects.",
                ),
                io.Image.Input("image", tooltip="The picture, or several. An alpha channel is enlarged too."),
                io.Float.Input(
                    "scale",
                    default=2.0,
                    min=1.0,
                    max=MAX_SCALE,
                    step=0.25,
                    round=0.001,
                    tooltip="How many times wider and higher. 1 keeps the size, for example after an upscale model.",
                ),
                seed_input("The noise is drawn for the whole picture, so it is the same for every tile size."),
                steps_input(),
                denoise_input(
                    default=0.25,
                    tooltip="How much is redrawn, rounded to the nearest trained timestep (4 steps: .25, .5, .75, "
                    "1). Low values keep the picture. Super-resolution models always use 1.",
                ),
                guidance_input(
                    "Classifier-free guidance (KSampler's cfg). Leave it at 1: Flash models have guidance built in. "
                    "Above 1 it needs a negative prompt and twice the time."
                ),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="A tile's sides in pixels. 0: the model's training size (SD 1.5: 512, SDXL: 1024). Lower "
                    "it if memory runs out.",
                ),
                advanced(
                    io.Float.Input,
                    "overlap",
                    default=0.25,
                    min=0.0,
                    max=MAX_OVERLAP,
                    step=0.05,
                    round=0.01,
                    tooltip="The least share of a tile that its neighbour covers too. More is slower and blends more "
                    "softly; 0 shows seams.",
                ),
                advanced(
                    io.Float.Input,
                    "noise_augmentation",
                    default=0.057,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.001,
                    tooltip="Only for the SD x4 upscaler: noise on the small picture (1 is level 350; .057 is level "
                    "20, diffusers' default). Raise it for more invented detail.",
                ),
                *grid_inputs(),
                negative_input(),
                preset_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The enlarged picture.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: VAE,
        positive: list[Any],
        image: Tensor,
        scale: float,
        seed: int,
        steps: int,
        denoise: float,
        guidance: float,
        tile_size: int,
        overlap: float,
        noise_augmentation: float,
        grid: GridName = "trained",
        timesteps: str = "",
        negative: list[Any] | None = None,
        preset: str = AUTO,
    ) -> io.NodeOutput:
        """Enlarge, encode, sample and decode, tile by tile and picture by picture."""
        prompts = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
        check_vae(vae, model)
        check_makes_pictures(model, "Flash Upscale")
        check_prompts(model, **prompts)
        check_cuttable(prompts, guidance)
        check_unconditional(model, negative)
        concat = concat_of(model, vae, prompts)
        chosen = flash_grid(model, steps, denoise if concat is None else 1.0, grid, timesteps, preset)
        tiles, vae_tiles = plan(model, vae, image, scale, tile_size, overlap)
        check_numbers("image", image)
        if concat is None:
            check_channels(model, (tiles.height, tiles.width), **prompts)
        check_attached(prompts, tiles)
        if len(tiles) > 1:
            check_tileable(model)
        pictures = enlarge(image, scale)
        batch = len(pictures)
        fresh = grid_transitions(model, chosen)
        warned = guidance_warnings(chosen.preset, steps, guidance, positive)
        show_text(cls, text_on_node(f"{chosen.text}, {describe(tiles, vae, pictures)}", fresh, warned))

        passes = len(vae_tiles) * (1 if concat is not None and concat.holds == "picture" else 2)
        progress = Progress(model, batch * (passes + len(tiles) * len(chosen.timesteps)), tiles)
        latents = torch.zeros(batch, vae.latent_channels, tiles.height, tiles.width)
        if concat is None or concat.holds == "latent":
            for latent, picture in zip(latents, pictures, strict=True):
                encode_tiled(vae, picture[None, ..., :3], vae_tiles, latent[None], progress.tile)
        noise = comfy.sample.prepare_noise(latents, seed)
        for index in range(batch):
            one = slice(index, index + 1)
            conds, start = prompts, latents[one]
            if concat is not None:
                conds = {
                    name: concat.attached(model, prompt, image[one, ..., :3], start, noise_augmentation)
                    for name, prompt in prompts.items()
                }
                start = torch.zeros_like(start)
            if len(tiles) > 1:
                conds = {name: with_tile_size(prompt, tiles) for name, prompt in conds.items()}
            guider = comfy.samplers.CFGGuider(tiled_model(model, tiles, progress.tile, index, batch))
            guider.inner_set_conds(conds)
            guider.set_cfg(guidance)
            latents[one] = guider.sample(
                noise[one],
                start,
                flash_sampler(transitions=fresh),
                chosen.sigmas,
                callback=progress.step,
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
        for latent, picture in zip(latents, pictures, strict=True):
            decode_tiled(vae, latent[None], vae_tiles, picture[None, ..., :3], progress.tile)
        return io.NodeOutput(pictures)


class Progress:
    """The node's progress bar (one unit for each tile) and preview (one for each step).

    Args:
        model: for the preview's colours.
        total: the number of tiles, including the VAE's.
        tiles: a preview is reduced to the size of one tile, because it may run a decoder on the whole latent.
    """

    def __init__(self, model: ModelPatcher, total: int, tiles: Tiling) -> None:
        import latent_preview  # ComfyUI's; not importable before its server has started

        self.bar = comfy.utils.ProgressBar(total)
        self.preview = latent_preview.prepare_callback(model, total)
        self.shrink = max(tiles.height / tiles.tile_height, tiles.width / tiles.tile_width)

    def tile(self) -> None:
        """Count one finished tile."""
        self.bar.update(1)

    def step(self, step: int, z0: Tensor, z: Tensor, steps: int) -> None:
        """Show a preview after a step: ComfyUI's callback."""
        if self.shrink > 1:
            size = [max(1, int(side / self.shrink)) for side in z0.shape[-2:]]
            z0 = torch.nn.functional.interpolate(z0, size, mode="area")
        self.preview(self.bar.current - 1, z0, z, self.bar.total)


@dataclass(frozen=True)
class Concat:
    """The further input channels of a super-resolution model.

    Attributes:
        key: ComfyUI's name for them in a conditioning.
        holds: ``picture``: the small picture, one pixel for each latent position; ``latent``: the enlarged picture's
            latent.
        channels: their number.
    """

    key: str
    holds: Literal["picture", "latent"]
    channels: int

    def attached(
        self, model: ModelPatcher, prompt: list[Any], picture: Tensor, latent: Tensor, noise_augmentation: float
    ) -> list[Any]:
        """Attach the channels to a prompt; a prompt that already has channels keeps its own.

        Args:
            model: the MODEL.
            prompt: the conditioning.
            picture: (1, H, W, 3), before it was enlarged.
            latent: (1, C, h, w), the VAE's latent of the enlarged picture.
            noise_augmentation: for the x4 upscaler, in 0..1.
        """
        if self.holds == "picture":
            latent = resize(picture, *latent.shape[-2:]).movedim(-1, 1) * 2 - 1
        elif self.key == CONCAT_KEY:  # ComfyUI does not scale these channels
            latent = model.get_model_object("latent_format").process_in(latent)
        values = {self.key: latent, "noise_augmentation": noise_augmentation}
        return [[tokens, entries if self.key in entries else {**entries, **values}] for tokens, entries in prompt]


def concat_of(model: ModelPatcher, vae: VAE, prompts: dict[str, list[Any]]) -> Concat | None:
    """Return the channels with which the model reads the small picture; None for an ordinary model.

    Raises:
        ValueError: the model reads an unknown number of channels, or a prompt has another number of channels.
    """
    inner = model.model
    latent_channels = model.get_model_object("latent_format").latent_channels
    network = inner.model_config.unet_config
    channels = network["in_channels"] - latent_channels if "model_channels" in network else 0  # UNets only
    if isinstance(inner, comfy.model_base.SD_X4Upscaler):
        ratio = vae.spacial_compression_decode()
        if ratio != X4_RATIO:
            raise ValueError(
                f"This VAE has one latent position for {ratio} x {ratio} pixels; the x4 upscaler needs "
                f"{X4_RATIO} x {X4_RATIO}. Connect the VAE from the upscaler's checkpoint."
            )
        concat = Concat("concat_image", "picture", channels)
    elif isinstance(inner, comfy.model_base.IP2P):
        concat = Concat("concat_latent_image", "latent", channels)
    elif channels in (0, latent_channels + 1):
        return None  # channels of an inpainting model: ComfyUI fills them in
    else:
        concat = Concat(CONCAT_KEY, "picture" if channels == PICTURE_CHANNELS else "latent", channels)
    expected = PICTURE_CHANNELS if concat.holds == "picture" else latent_channels
    entries = [entry for prompt in prompts.values() for _, entry in prompt]
    brought = [entry[concat.key].shape[1] for entry in entries if concat.key in entry]
    if any(found != channels for found in brought) or (len(brought) < len(entries) and channels != expected):
        raise ValueError(
            f"This model reads {channels} channels beside its {latent_channels} latent channels; "
            + (
                f"the prompt has {brought[0]}"
                if brought
                else f"a picture has {PICTURE_CHANNELS}, a latent {latent_channels}"
            )
            + ". Load an ordinary or a super-resolution model, or attach this model's channels with Flash Concat "
            "Conditioning."
        )
    return concat


def check_cuttable(prompts: dict[str, list[Any]], guidance: float) -> None:
    """Raise ValueError where guidance has no negative prompt, or a prompt cannot be cut to tiles."""
    check_guidance(guidance, prompts.get("negative"))
    if any("gligen" in entries for prompt in prompts.values() for _, entries in prompt):
        raise ValueError(
            "The prompt has GLIGEN boxes, which cannot be cut to tiles. Remove GLIGENTextBoxApply, or place prompts "
            "with Conditioning (Set Area)."
        )


def check_attached(prompts: dict[str, list[Any]], tiles: Tiling) -> None:
    """Raise ValueError where a prompt has input channels of another size than the enlarged picture's latent."""
    for attached in (entries.get(CONCAT_KEY) for prompt in prompts.values() for _, entries in prompt):
        if attached is not None and tuple(attached.shape[-2:]) != (tiles.height, tiles.width):
            raise ValueError(
                f"The prompt has input channels for a latent of {attached.shape[-1]} x {attached.shape[-2]}; the "
                f"latent of the enlarged picture is {tiles.width} x {tiles.height}. Remove Flash Concat Conditioning "
                "before this node: Flash Upscale attaches the picture itself."
            )


def plan(
    model: ModelPatcher, vae: VAE, image: Tensor, scale: float, tile_size: int, overlap: float
) -> tuple[Tiling, Tiling]:
    """Plan the model's tiles and the VAE's tiles, both in latent positions.

    Raises:
        ValueError: the picture is not RGB or does not fit into memory, or the tiles are too small.
    """
    check_picture("image", image)
    pictures, height, width, channels = image.shape
    if 0 < tile_size < LEAST_TILE:
        raise ValueError(
            f"tile_size is {tile_size} pixels, which is too small for any model. Set {LEAST_TILE} or more, or 0 for "
            "the model's training size."
        )
    height, width = target_size(height, width, scale)
    needed = pictures * height * width * channels * torch.float32.itemsize * SPARE
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{count(pictures, 'picture')} of {width} x {height} pixels (enlarged {scale:g} times) would take "
            f"{needed / 2**30:.1f} GiB of memory, but only {free / 2**30:.1f} GiB are free. Lower scale, or enlarge "
            "fewer pictures at once."
        )
    ratio = vae.spacial_compression_encode()
    side = tile_size or native_side(model)
    sizes = latent_sizes(model)
    # The border that a model needs beyond the picture is cut off again after decoding.
    whole = sizes.padded(-(-height // ratio), -(-width // ratio))
    tile, vae_tile = sizes.tile(max(side // ratio, 1), *whole), max(side, VAE_TILE) // ratio
    return (
        plan_tiles(*whole, tile, round(tile * overlap)),
        plan_tiles(*whole, vae_tile, round(vae_tile * VAE_OVERLAP)),
    )


def target_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Return the enlarged picture's (height, width) in pixels."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def enlarge(image: Tensor, scale: float) -> Tensor:
    """Enlarge pictures (B, H, W, C), bicubic, to new memory (B, scale H, scale W, C), float32."""
    height, width = target_size(image.shape[1], image.shape[2], scale)
    pictures = torch.empty(len(image), height, width, image.shape[-1], device=image.device)
    for picture, larger in zip(image, pictures, strict=True):
        for channel in range(image.shape[-1]):  # one by one: to resize takes the memory of a few results
            part = slice(channel, channel + 1)
            larger[..., part] = resize(picture[None, ..., part].float(), height, width)[0]
    return pictures


def describe(tiles: Tiling, vae: VAE, pictures: Tensor) -> str:
    """Describe the tiles for the node's face."""
    ratio = vae.spacial_compression_decode()
    height, width = pictures.shape[1:3]
    if len(tiles) == 1:
        return f"{width} x {height} pixels in one tile"
    return (
        f"{width} x {height} pixels in {len(tiles.lefts)} x {len(tiles.tops)} tiles of {tiles.tile_width * ratio} x "
        f"{tiles.tile_height * ratio}"
    )
