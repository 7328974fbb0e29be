"""Flash Concat Conditioning: pictures, latents and masks as further input channels of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.image import resize, same_shape
from ..shared.inputs import check_batch, check_numbers, check_picture, fixed_latent
from ..shared.model_facts import CONCAT_KEY, check_vae, further_channels
from ..shared.prompts import check_prompts
from ..shared.schema import node_schema

PARTS = ("mask", "image", "image_2", "latent")


def listed_parts(order: str, given: Mapping[str, object]) -> list[str]:
    """Read ``order`` ("mask, image"); it must list exactly the connected parts.

    Args:
        given: the connected parts by name.

    Raises:
        ValueError: a name is unknown, repeated or not connected, or a connected part is not listed.
    """
    names = [name.strip() for name in order.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or len(set(names)) != len(names):
        wrong = f"{unknown[0]!r} is no input" if unknown else "an input is named twice"
        raise ValueError(f"The order is {order!r}, but {wrong}. List each of {', '.join(PARTS)} at most once.")
    missing = [name for name in names if name not in given]
    left = [name for name in given if name not in names]
    if missing or left:
        what = f"{missing[0]} is not connected" if missing else f"{left[0]} is connected but not listed"
        raise ValueError(f"The order is {order!r}, but {what}. List exactly the connected inputs, in channel order.")
    if not names:
        raise ValueError(
            "No mask, image or latent is connected, so there is no channel to add. Connect one, and list it in 'order'."
        )
    return names


def fitted(name: str, value: Tensor, height: int, width: int) -> Tensor:
    """Resize a picture (B, h, w, C) or mask (B, h, w).

    Raises:
        ValueError: the aspect ratio would change.
    """
    found_height, found_width = value.shape[1:3]
    if not same_shape((found_height, found_width), (height, width)):
        raise ValueError(
            f"{name} is {found_width} x {found_height}, but the latent is for {width} x {height} pixels: the shapes "
            "differ. Crop or pad the picture to the latent's shape first."
        )
    return resize(value, height, width)


class FlashConcatConditioning(io.ComfyNode):
    """Give a concat model masks, pictures and latents as further channels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            branch="conditioning",
            node_id="FlashConcatConditioning",
            display_name="Flash Concat Conditioning",
            search_aliases=[
                "concat",
                "input channels",
                "instruct pix2pix",
                "super resolution",
                "c_concat",
                "flash diffusion",
            ],
            description="Give a concat model its further input channels, in any order, and check their number.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will sample. It reads more channels than its latent has."
                ),
                io.Conditioning.Input("positive", tooltip="The prompt that gets the channels."),
                io.Latent.Input("latent_image", tooltip="The latent that will be sampled. The channels get its size."),
                io.String.Input(
                    "order",
                    default="image",
                    tooltip="The connected inputs in the model's channel order, separated by commas, such as 'image' "
                    "for super-resolution or 'mask, image' for inpainting.",
                ),
                io.Combo.Input(
                    "images_as",
                    options=["latent", "pixels"],
                    tooltip="latent: the VAE encodes pictures (most models). pixels: pictures are resized to the "
                    "latent's size, as the SD x4 upscaler needs.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The negative prompt. It gets the same channels."
                ),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE. Needed if images_as is latent."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="One channel: 1 where white, 0 where black. Resized to the latent (nearest).",
                ),
                io.Image.Input("image", optional=True, tooltip="A picture in the latent's shape."),
                io.Image.Input("image_2", optional=True, tooltip="A second picture, such as the face to insert."),
                io.Latent.Input("latent", optional=True, tooltip="A latent of the same size. It is not changed."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the channels."),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The negative prompt with the channels; empty if negative is not connected.",
                ),
                io.String.Output(display_name="report", tooltip="The channels that the model gets."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: list[Any],
        latent_image: dict[str, Any],
        order: str,
        images_as: str,
        negative: list[Any] | None = None,
        vae: VAE | None = None,
        mask: Tensor | None = None,
        image: Tensor | None = None,
        image_2: Tensor | None = None,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        """Build the channels, check their number, and attach them."""
        offered = {"mask": mask, "image": image, "image_2": image_2, "latent": latent}
        given = {name: value for name, value in offered.items() if value is not None}
        check_prompts(model, positive=positive, negative=negative)
        height, width = fixed_latent(model, latent_image).shape[-2:]
        channels = {
            name: channels_of(name, given[name], model, vae, images_as, height, width)
            for name in listed_parts(order, given)
        }
        for name, value in channels.items():
            check_batch(
                len(value), name if name in ("mask", "latent") else "image", len(latent_image["samples"]), "latent"
            )
        counts = ", ".join(f"{name} {value.shape[1]}" for name, value in channels.items())
        total, wanted = sum(value.shape[1] for value in channels.values()), further_channels(model)
        if total != wanted:
            raise ValueError(
                f"This model reads {wanted} channels beside its latent, but {total} are connected ({counts}). "
                + (
                    "It is no concat model: connect the prompt directly to the sampler, or load a model for this task."
                    if wanted == 0
                    else "Connect the inputs that the model was trained with, and check 'images_as'."
                )
            )
        batch = max(len(value) for value in channels.values())
        concat = torch.cat([value.expand(batch, *value.shape[1:]) for value in channels.values()], dim=1)
        values = {CONCAT_KEY: concat}
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, values),
            None if negative is None else node_helpers.conditioning_set_values(negative, values),
            f"{total} channels: {counts}",
        )


def channels_of(
    name: str, value: Any, model: ModelPatcher, vae: VAE | None, images_as: str, height: int, width: int
) -> Tensor:
    """Make the channels (B, C, height, width) of one part, as the network reads them.

    Raises:
        ValueError: the part does not fit the latent or the VAE.
    """
    latent_format = model.get_model_object("latent_format")
    scale = getattr(latent_format, "spacial_downscale_ratio", 8)
    if name == "latent":
        samples = value["samples"]
        check_numbers(name, samples)
        if tuple(samples.shape[-2:]) != (height, width) or samples.shape[1] != latent_format.latent_channels:
            raise ValueError(
                f"latent has the shape {tuple(samples.shape[1:])}, but the latent to sample has "
                f"{(latent_format.latent_channels, height, width)}. Encode both at the same size, with the same VAE."
            )
        scaled: Tensor = latent_format.process_in(samples)
        return scaled
    if name == "mask":
        check_numbers(name, value)
        masks = value[None] if value.ndim == 2 else value
        fitting = fitted(name, masks, height * scale, width * scale)
        return torch.nn.functional.interpolate(fitting[:, None].round(), (height, width), mode="nearest")
    check_picture(name, value)
    check_numbers(name, value)
    picture = value[..., :3]
    if images_as == "pixels":
        return fitted(name, picture, height, width).movedim(-1, 1) * 2 - 1
    if vae is None:
        raise ValueError(f"{name} must become a latent, but no VAE is connected. Connect the model's VAE to 'vae'.")
    check_vae(vae, model)
    encoded: Tensor = latent_format.process_in(vae.encode(fitted(name, picture, height * scale, width * scale)))
    return encoded
