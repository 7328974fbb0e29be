"""Evaluate models and VAEs in tiles, and blend the tiles.

The tiles are blended after every evaluation, so that a sampler works on the whole latent from one noise level to the
next. Prompts, areas, masks, concat channels and ControlNet hints are cut to each tile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.utils
import torch
from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.sd import VAE
from torch import Tensor

from ...flash_core.image import Box, Tiling, crop, pad_picture

WRAPPER_KEY = "flash_tiles"
SIZE_RATIO = 8  # pixels for each latent position in the sizes that ComfyUI gives a model (SDXL, PixArt)


def tiled_model(
    model: ModelPatcher, tiles: Tiling, after_tile: Callable[[], None], picture: int = 0, pictures: int = 1
) -> ModelPatcher:
    """Clone a model so that it is evaluated in tiles, with the memory of one tile.

    The tiles' clean predictions are blended for the prompt and for the negative prompt, before guidance combines them;
    so every kind of guidance and every sampler works. A run can be interrupted between tiles.

    Args:
        model: the MODEL, which does not change.
        tiles: in latent positions. With a single tile the model is evaluated as usual.
        after_tile: called after each tile, for progress.
        picture: the index of this picture, for prompts that hold one entry (such as a hint) for each picture.
            Default: 0.
        pictures: the number of pictures. Default: 1.
    """
    whole = (tiles.height, tiles.width)

    def evaluate(
        executor: Any, inner: Any, conds: list[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any]
    ) -> list[Tensor]:
        if tuple(x.shape[-2:]) != whole or (len(tiles) == 1 and pictures == 1):
            outputs: list[Tensor] = executor(inner, conds, x, timestep, model_options)
            after_tile()
            return outputs
        outputs = [torch.zeros_like(x) for _ in conds]
        for index, box in enumerate(tiles.boxes):
            comfy.model_management.throw_exception_if_processing_interrupted()
            cut = Cut(box, whole, picture, pictures, hints)
            parts = executor(inner, [cut.prompt(cond) for cond in conds], tiles.take(x, index), timestep, model_options)
            for output, part in zip(outputs, parts, strict=True):
                tiles.add(output, part, index)
            after_tile()
        return outputs

    def prepare(executor: Any, patcher: ModelPatcher, shape: Any, *arguments: Any, **named: Any) -> Any:
        return executor(patcher, [*shape[:-2], tiles.tile_height, tiles.tile_width], *arguments, **named)

    hints: dict[int, list[Tensor]] = {}
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, WRAPPER_KEY, evaluate)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, WRAPPER_KEY, prepare)
    return clone


class Cut:
    """Cut prompts that ComfyUI has processed for the whole latent to one tile.

    Args:
        box: the tile.
        whole: the latent's (height, width).
        picture, pictures: see :func:`tiled_model`.
        hints: cache {id of a control: its hints at the size of the whole picture}, shared by all tiles.
    """

    def __init__(
        self, box: Box, whole: tuple[int, int], picture: int, pictures: int, hints: dict[int, list[Tensor]]
    ) -> None:
        self.box = box
        self.whole = whole
        self.picture = picture
        self.pictures = pictures
        self.hints = hints
        # Prompt and negative prompt must share one object: only then does ComfyUI evaluate them together.
        self.controls: dict[int, ControlBase] = {}

    def prompt(self, conds: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Cut a list of prompts, without those whose area lies outside the tile."""
        if conds is None:
            return None
        return [self.cond(cond) for cond in conds if "area" not in cond or self.area(cond["area"]) is not None]

    def cond(self, cond: dict[str, Any]) -> dict[str, Any]:
        """Cut one prompt."""
        tile = {**cond, "model_conds": {name: self.model_cond(value) for name, value in cond["model_conds"].items()}}
        if "area" in cond:
            tile["area"] = self.area(cond["area"])
        if "mask" in cond:
            tile["mask"] = self.region(self.own(cond["mask"]))
        if "control" in cond:
            tile["control"] = self.control(cond["control"])
        return tile

    def area(self, area: Any) -> list[int] | None:
        """Cut ComfyUI's (height, width, top, left) of an area; None if the area lies outside the tile."""
        height, width, top, left = area
        above, before = max(top, self.box.top), max(left, self.box.left)
        below, after = min(top + height, self.box.bottom), min(left + width, self.box.right)
        if below <= above or after <= before:
            return None
        return [below - above, after - before, above - self.box.top, before - self.box.left]

    def model_cond(self, value: Any) -> Any:
        """Cut a model condition; only concat channels have the latent's size."""
        data = getattr(value, "cond", None)
        if not isinstance(data, Tensor):
            return value
        if isinstance(value, comfy.conds.CONDNoiseShape):
            data = self.region(data)
        return value._copy_with(self.own(data))

    def control(self, control: ControlBase) -> ControlBase:
        """Copy a ControlNet or T2I-adapter, and its chain, with the tile's part of the hints."""
        if id(control) not in self.controls:
            # A shallow copy, because ControlBase.copy loses the state of the run.
            tile = copy.copy(control)
            if id(control) not in self.hints:
                self.hints[id(control)] = self.whole_hints(control)
            hint, *extra = (self.hint_region(hint) for hint in self.hints[id(control)])
            tile.cond_hint_original, tile.extra_concat_orig = hint, extra
            tile.cond_hint = tile.extra_concat = None
            if hasattr(tile, "control_input"):
                tile.control_input = None
            if control.previous_controlnet is not None:
                tile.set_previous_controlnet(self.control(control.previous_controlnet))
            self.controls[id(control)] = tile
        return self.controls[id(control)]

    def whole_hints(self, control: ControlBase) -> list[Tensor]:
        """Return a control's hint and its further channels at the picture's size, scaled as ComfyUI does."""
        ratio = control.compression_ratio * (control.vae.spacial_compression_encode() if control.vae else 1)
        height, width = (side * ratio for side in self.whole)
        hints = [control.cond_hint_original, *control.extra_concat_orig]
        return [
            comfy.utils.common_upscale(self.own(hint), width, height, control.upscale_algorithm, "center")
            for hint in hints
        ]

    def hint_region(self, hint: Tensor) -> Tensor:
        """Cut a hint of the picture's size."""
        ratio = hint.shape[-1] // self.whole[1]
        rows = slice(self.box.top * ratio, self.box.bottom * ratio)
        return hint[..., rows, self.box.left * ratio : self.box.right * ratio]

    def region(self, whole: Tensor) -> Tensor:
        """Cut a tensor of the latent's size."""
        return whole[..., self.box.top : self.box.bottom, self.box.left : self.box.right]

    def own(self, several: Tensor) -> Tensor:
        """Return this picture's row of a tensor with one row for each picture; else the tensor itself."""
        return several[self.picture : self.picture + 1] if len(several) == self.pictures else several


def encode_tiled(vae: VAE, picture: Tensor, tiles: Tiling, latent: Tensor, after_tile: Callable[[], None]) -> None:
    """Encode a picture in tiles that are blended in the latent.

    ComfyUI's own tiled encoding and decoding run three times over a picture and cannot be interrupted. Its decoding
    needs the memory of five pictures at its peak (``benchmarks/README.md``), :func:`decode_tiled` that of one.

    Args:
        vae: the VAE.
        picture: (1, H, W, 3); a border that does not fill a latent position is repeated outward.
        tiles: in latent positions.
        latent: (1, C, h, w) of zeros, filled in place.
        after_tile: called after each tile, for progress.
    """
    for index, box in enumerate(tiles.scaled(vae.spacial_compression_encode()).boxes):
        comfy.model_management.throw_exception_if_processing_interrupted()
        part = crop(picture, box)
        filled = pad_picture(part, 0, 0, box.width - part.shape[2], box.height - part.shape[1])
        tiles.add(latent, vae.encode(filled), index)
        after_tile()


def decode_tiled(vae: VAE, latent: Tensor, tiles: Tiling, picture: Tensor, after_tile: Callable[[], None]) -> None:
    """Decode a latent in tiles into a picture, in place; see :func:`encode_tiled`."""
    picture.zero_()
    pixels = tiles.scaled(vae.spacial_compression_decode())
    for index in range(len(tiles)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        part = vae.decode(tiles.take(latent, index)).movedim(-1, 1)
        pixels.add(picture.movedim(-1, 1), part, index)
        after_tile()
    picture.clamp_(0, 1)


def with_tile_size(prompt: list[Any], tiles: Tiling) -> list[Any]:
    """Give models that read a picture's size (SDXL, PixArt) the tile's size, as in their training."""
    size = {"width": tiles.tile_width * SIZE_RATIO, "height": tiles.tile_height * SIZE_RATIO}
    return [[tokens, {**size, **entries}] for tokens, entries in prompt]
