"""Flash Inpaint Prepare and Stitch: crop around the mask, at the size the model was trained on, and paste back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_base
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.v0_0_2 import io
from torch import Tensor

import nodes as core_nodes  # ComfyUI's own

from ...flash_core.image import (
    Box,
    blend_into,
    context_box,
    crop,
    dilate,
    feather,
    mask_box,
    pad_picture,
    resize,
    same_shape,
    shape_within,
    without_drift,
    working_size,
)
from ..shared.inputs import check_batch, check_numbers, check_picture
from ..shared.model_facts import check_vae, further_channels, native_side, widest_ratio
from ..shared.prompts import check_prompts
from ..shared.schema import count, node_schema
from ..shared.sizes import PIXELS, check_size

Stitch = io.Custom("FLASH_STITCH")

MAX_SIDE = 8192


@dataclass(frozen=True)
class StitchPlan:
    """The data to paste a crop back into its picture.

    Attributes:
        picture: (B, H, W, C), the whole picture with its padding.
        box: the crop's place in the picture.
        weight: (B or 1, box.height, box.width): result = weight * crop + (1 - weight) * picture. At 0 a pixel keeps its
            bits.
        place: the box's place in the crop, in the picture's pixels. The crop is larger than the box where the picture
            is too narrow for a shape that the model can draw.
        framed: the crop's (height, width) in the picture's pixels.
    """

    picture: Tensor
    box: Box
    weight: Tensor
    place: Box
    framed: tuple[int, int]


def size_multiple(side: int) -> int:
    """Return 64 for published models (``side`` of 512 or more), else 16: crops are resized to a multiple of it."""
    return 64 if side >= 512 else 16


def is_inpaint_model(model: ModelPatcher) -> bool:
    """Return whether the model reads the mask and the masked picture as channels (9-channel models, Flux Fill)."""
    if isinstance(model.model, comfy.model_base.Flux):  # a model with the picture alone (Canny, Depth) has no more
        return further_channels(model) > int(model.get_model_object("latent_format").latent_channels)
    return "masked_image" in model.model.concat_keys


def fitted_mask(mask: Tensor | None, picture: Tensor, padded: bool) -> Tensor:
    """Resize the mask to the picture: (1 or B, H, W).

    Args:
        mask: None or empty gives zeros if ``padded``.
        picture: (B, H, W, C).
        padded: the picture will be padded, so that an empty mask is allowed.

    Raises:
        ValueError: the mask is empty without padding, or it belongs to another picture.
    """
    batch, height, width = picture.shape[:3]
    if mask is not None and mask.ndim == 2:
        mask = mask[None]
    if mask is None or not bool((mask > 0).any()):
        if padded:
            return picture.new_zeros(1, height, width)
        raise ValueError(
            "There is nothing to inpaint: "
            + ("no mask is connected" if mask is None else "the mask is empty")
            + ". Paint a mask (right-click the picture of Load Image: Open in MaskEditor) and connect it to 'mask', or "
            "set a padding to extend the picture. White is redrawn; use Invert Mask for an inverted mask."
        )
    check_batch(len(mask), "mask", batch, "picture")
    mask_height, mask_width = mask.shape[1:]
    if not same_shape((mask_height, mask_width), (height, width)):
        raise ValueError(
            f"The mask is {mask_width} x {mask_height} pixels, but the picture is {width} x {height}: the shapes "
            "differ. Use the mask that was painted on this picture, or crop both in the same way."
        )
    return resize(mask.to(picture), height, width).clamp(0, 1)


def size_input() -> io.Input:
    """Make the widget for the size at which a crop is sampled."""
    return io.Int.Input(
        "size",
        default=0,
        min=0,
        max=MAX_SIDE,
        step=8,
        tooltip="The crop is sampled at about size x size pixels in area. 0: the model's training size (SD 1.5: 512, "
        "SDXL: 1024).",
    )


def context_input(part: str, default: float) -> io.Input:
    """Make the widget for how much the model sees around a part of the picture."""
    return io.Float.Input(
        "context",
        default=default,
        min=1.0,
        max=16.0,
        step=0.1,
        round=0.01,
        tooltip=f"The crop's size as a multiple of {part}'s size. More context fits in better, less gives more detail.",
    )


def feather_input(default: int, tooltip: str) -> io.Input:
    """Make the widget for the width of a crop's soft edge."""
    return io.Int.Input("feather", default=default, min=0, max=512, tooltip=tooltip)


class FlashInpaintPrepare(io.ComfyNode):
    """Prepare a picture and a mask for a few-step sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        padding = [
            # Not advanced: a blueprint hides what is, and outpainting is nothing without them.
            io.Int.Input(f"pad_{side}", default=0, min=0, max=MAX_SIDE, step=8, tooltip=f"Outpainting: {where}.")
            for side, where in (
                ("left", "pixels to add on the left"),
                ("top", "pixels to add above"),
                ("right", "pixels to add on the right"),
                ("bottom", "pixels to add below"),
            )
        ]
        return node_schema(
            branch="image",
            node_id="FlashInpaintPrepare",
            display_name="Flash Inpaint Prepare",
            search_aliases=[
                "inpainting",
                "inpaint crop",
                "crop and stitch",
                "outpainting",
                "mask crop",
                "flash diffusion",
            ],
            description="Crop around the mask, with context, at the size the model was trained on; ready to sample.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will sample: an ordinary one, or a 9-channel inpainting model."
                ),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Conditioning.Input("positive", tooltip="The prompt for the masked part."),
                io.Image.Input("image", tooltip="The picture, or several. An alpha channel is not changed."),
                size_input(),
                context_input("the masked part", 1.5),
                io.Int.Input(
                    "grow",
                    default=4,
                    min=0,
                    max=512,
                    tooltip="The mask grows by this many pixels. Raise it if old edges remain.",
                ),
                feather_input(
                    16, "Width in pixels of the soft edge outside the grown mask. Raise it if you see the edge."
                ),
                *padding,
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is redrawn, black is kept, grey is a mixture. Not needed if you only pad.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="What to avoid, for guidance above 1."),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt; for 9-channel models with mask and masked picture."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The same for the negative prompt; empty if it is not connected."
                ),
                io.Latent.Output(display_name="latent", tooltip="The crop with its noise mask. Connect Flash Sampler."),
                Stitch.Output(display_name="stitch", tooltip="Connect Flash Inpaint Stitch."),
                io.Image.Output(display_name="crop", tooltip="The crop that the model sees."),
                io.Mask.Output(display_name="crop_mask", tooltip="The crop's mask, grown and feathered."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: VAE,
        positive: list[Any],
        image: Tensor,
        size: int,
        context: float,
        grow: int,
        feather: int,
        pad_left: int,
        pad_top: int,
        pad_right: int,
        pad_bottom: int,
        mask: Tensor | None = None,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Crop, encode and mask; see :func:`plan_crop`."""
        check_vae(vae, model)
        check_prompts(model, positive=positive, negative=negative)
        check_picture("image", image)
        check_numbers("image", image)
        if mask is not None:
            check_numbers("mask", mask)
        padding = (pad_left, pad_top, pad_right, pad_bottom)
        plan, pixels, crop_mask = plan_crop(model, image, mask, padding, size, context, grow, feather)
        prompts = [positive, positive if negative is None else negative]
        if is_inpaint_model(model):
            *prompts, latent = core_nodes.InpaintModelConditioning().encode(*prompts, pixels, vae, crop_mask)
        else:
            latent = {"samples": vae.encode(pixels), "noise_mask": crop_mask[:, None]}
        return io.NodeOutput(prompts[0], None if negative is None else prompts[1], latent, plan, pixels, crop_mask)


def plan_crop(
    model: ModelPatcher,
    image: Tensor,
    mask: Tensor | None,
    padding: tuple[int, int, int, int],
    size: int,
    context: float,
    grow: int,
    softness: int,
) -> tuple[StitchPlan, Tensor, Tensor]:
    """Crop a picture around its mask, in a shape that the model can draw, and plan how the crop goes back.

    Args:
        model: the MODEL that will sample.
        image: (B, H, W, C), C of 3 or 4.
        mask: (1 or B, h, w), or None to fill only the padding.
        padding: left, top, right, bottom, in pixels.
        size: the crop has about the area of size x size pixels; 0: the model's training size.
        context: the crop's size as a multiple of the masked part's size.
        grow: pixels by which the mask grows.
        softness: pixels of the feather.

    Returns:
        ``(plan, pixels, mask)``: pixels (B, h, w, 3) and mask (B, h, w) at working size.

    Raises:
        ValueError: there is no mask, or the model cannot be evaluated at this size.
    """
    fitted = fitted_mask(mask, image, any(padding))
    left, top, right, bottom = padding
    if any(padding):
        image = pad_picture(image, left, top, right, bottom)
        fitted = torch.nn.functional.pad(fitted, (left, right, top, bottom), value=1.0)
    grown = dilate(fitted, grow)
    soft = feather(grown, softness)
    # Every pixel with a mask above 0 comes from the crop; outside, the crop fades out over the feather.
    weight = feather((grown > 0).to(grown), softness)
    masked = mask_box(weight)
    if masked is None:
        raise ValueError(
            "The mask is empty after growing and feathering. Please report this picture and mask as a bug."
        )
    height, width = image.shape[1:3]
    widest = widest_ratio(model)
    box = context_box(masked, height, width, context, widest=widest)
    framed = shape_within(box.height, box.width, widest)
    place = Box((framed[0] - box.height) // 2, (framed[1] - box.width) // 2, box.height, box.width)
    border = (place.left, place.top, framed[1] - place.right, framed[0] - place.bottom)
    side = size or native_side(model)
    working = working_size(*framed, side, size_multiple(side))
    check_size(model, working[0] // PIXELS, working[1] // PIXELS)
    pixels = resize(pad_picture(crop(image, box)[..., :3], *border), *working)
    left, top, right, bottom = border
    kept = torch.nn.functional.pad(crop(soft, box), (left, right, top, bottom))
    crop_mask = resize(kept, *working).expand(len(image), *working)
    return StitchPlan(image, box, crop(weight, box), place, framed), pixels, crop_mask


def stitch_weight(stitch: StitchPlan, mask: Tensor) -> Tensor:
    """Return a mask of the whole picture as the weight of a crop: (1 or B, box.height, box.width).

    Raises:
        ValueError: the mask is black over the crop, or it belongs to another picture.
    """
    box = stitch.box
    weight = crop(fitted_mask(mask, stitch.picture, padded=True), box)
    if not bool((weight > 0).any()):
        raise ValueError(
            f"The mask is black over the whole crop (columns {box.left} to {box.right - 1}, rows {box.top} to "
            f"{box.bottom - 1}), so nothing would be pasted. Paint it white within the crop, or disconnect 'mask' to "
            "paste where the prepared mask was."
        )
    return weight


class FlashInpaintStitch(io.ComfyNode):
    """Paste an inpainted crop back into its picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="image",
            node_id="FlashInpaintStitch",
            display_name="Flash Inpaint Stitch",
            search_aliases=["inpaint stitch", "uncrop", "paste crop", "crop and stitch", "flash diffusion"],
            description="Paste an inpainted crop back into its picture; every pixel outside the mask keeps its bits.",
            inputs=[
                Stitch.Input("stitch", tooltip="From Flash Inpaint Prepare or Flash Face Swap Prepare."),
                io.Image.Input("image", tooltip="The inpainted crop from VAE Decode, in any size; one or several."),
                io.Boolean.Input(
                    "match_colors",
                    default=False,
                    optional=True,
                    tooltip="On: removes the shift of colours that the crop's unmasked pixels show. Use it if the "
                    "pasted part is a little lighter, darker or tinted.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Paste only where this mask is white, instead of where the prepared mask was; black keeps "
                    "every bit. It has the output picture's size, or its shape.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The whole picture with its padding.")],
        )

    @classmethod
    def execute(
        cls, stitch: StitchPlan, image: Tensor, match_colors: bool = False, mask: Tensor | None = None
    ) -> io.NodeOutput:
        """Resize the crop to its box and blend it in; several crops of one picture give several pictures."""
        check_picture("image", image)
        check_numbers("image", image)
        if mask is not None:
            check_numbers("mask", mask)
        picture = stitch.picture
        if len(image) % len(picture):
            raise ValueError(
                f"There are {count(len(image), 'inpainted crop')} for {count(len(picture), 'picture')}. Sample "
                f"{len(picture)}, or a multiple of this number (Repeat Latent Batch)."
            )
        times = len(image) // len(picture)
        picture = picture.repeat(times, 1, 1, 1)
        weight = stitch.weight if mask is None else stitch_weight(stitch, mask)
        drawn = stitch.weight
        if len(weight) > 1:
            weight = weight.repeat(times, 1, 1)
        if len(drawn) > 1:
            drawn = drawn.repeat(times, 1, 1)
        part = crop(resize(image[..., :3].to(picture), *stitch.framed), stitch.place)
        if match_colors:
            part = without_drift(part, crop(picture, stitch.box)[..., :3], (drawn == 0).to(part))
        if picture.shape[-1] > 3:
            part = torch.cat([part, crop(picture, stitch.box)[..., 3:]], dim=-1)
        return io.NodeOutput(blend_into(picture, part, weight, stitch.box))
