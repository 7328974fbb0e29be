"""Flash Face Swap Prepare: put the face of one picture into another, with a concat model that reads both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import node_helpers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.v0_0_2 import io
from torch import Tensor

from ...flash_core.image import crop, mask_box, resize
from ..shared.inputs import check_batch, check_numbers, check_picture
from ..shared.model_facts import CONCAT_KEY, check_vae, further_channels
from ..shared.prompts import check_prompts
from ..shared.schema import node_schema
from .inpaint import Stitch, context_input, feather_input, fitted_mask, plan_crop, size_input

GREY = 0.5  # colour in place of the face, as in training
MASKED = 0.5  # a soft mask counts as masked from this value on, as in training
FRAMING = 1.6  # a training picture's sides are 1.7 and 1.4 times those of its face

# The output of ComfyUI's face detectors (since 0.33). Older ComfyUI has no such node, so the sockets stay free.
BoundingBoxes = io.Custom("BOUNDING_BOX")

# The mark of a swapped picture. ComfyUI writes the graph with all its values into a picture's file, even if this node
# was cached. (An entry in extra_pnginfo would be missing then.) It is the only choice of a required input, so no graph
# can leave it out.
NOTICE = "A face is swapped here by Flash Diffusion. Only for pictures that one has the right to change."


class FlashFaceSwapPrepare(io.ComfyNode):
    """Prepare two pictures and their face masks for a face-swap model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def detected(name: str, whose: str) -> io.Input:
            return BoundingBoxes.Input(
                name,
                optional=True,
                tooltip=f"Instead of a mask: {whose} face from a detector, such as ComfyUI's Detect Face Landmarks. "
                "The largest face is used.",
                extra_dict={"forceInput": True},
            )

        return node_schema(
            branch="image",
            node_id="FlashFaceSwapPrepare",
            display_name="Flash Face Swap Prepare",
            search_aliases=["face swap", "faceswap", "reactor", "identity", "deepfake", "flash diffusion"],
            description="Hide the target's face and show the model another face. Only for pictures that you have the "
            "right to change.",
            inputs=[
                io.Model.Input("model", tooltip="A face-swap model: it reads a mask and two pictures as channels."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. Leave its text empty: face-swap models are trained without text."
                ),
                io.Image.Input(
                    "target", tooltip="The picture whose face is replaced. You must have the right to change it."
                ),
                io.Image.Input("source", tooltip="The picture of the new face. The person must agree."),
                size_input(),
                context_input("the face", FRAMING),
                feather_input(8, "Width in pixels of the soft edge outside the mask. Raise it if you see the edge."),
                io.Combo.Input(
                    "notice",
                    options=[NOTICE],
                    tooltip="ComfyUI saves this notice with the graph in every picture's metadata.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="White where the target's face is: painted, or from a detector that makes masks.",
                ),
                detected("target_face", "the target's"),
                io.Mask.Input(
                    "source_mask",
                    optional=True,
                    tooltip="White where the source's face is. Without a mask the whole source counts as the face.",
                ),
                detected("source_face", "the source's"),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The negative prompt, for guidance above 1. Without it the prompt is used.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The prompt with the mask, the target and the identity."
                ),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The same without the identity, so that guidance above 1 increases the likeness.",
                ),
                io.Latent.Output(display_name="latent", tooltip="The crop with its noise mask. Connect Flash Sampler."),
                Stitch.Output(display_name="stitch", tooltip="Connect Flash Inpaint Stitch."),
                io.Image.Output(display_name="identity", tooltip="The source's face as the model sees it."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: VAE,
        positive: list[Any],
        target: Tensor,
        source: Tensor,
        size: int,
        context: float,
        feather: int,
        notice: str,
        target_mask: Tensor | None = None,
        target_face: object | None = None,
        source_mask: Tensor | None = None,
        source_face: object | None = None,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:
        """Crop the target, hide its face, and encode the model's channels."""
        if notice != NOTICE:  # ComfyUI 0.3.75 does not check choices
            raise ValueError(f"The notice is {notice!r}; expected {NOTICE!r}. This is the mark of swapped pictures.")
        check_vae(vae, model)
        check_face_swap_model(model)
        check_prompts(model, positive=positive, negative=negative)
        for name, picture in (("target", target), ("source", source)):
            check_picture(name, picture)
            check_numbers(name, picture)
        check_batch(len(source), "source", len(target), "target")
        face = face_mask("target", target, target_mask, target_face)
        if face is None:
            raise ValueError(
                "The target's face is not marked: "
                + ("no mask is connected" if target_mask is None else "the mask is empty")
                + ". Paint a mask (right-click the picture of Load Image: Open in MaskEditor). Or connect a detector's "
                "mask to 'target_mask', or its boxes to 'target_face'. White must be the face; use Invert Mask for an "
                "inverted mask."
            )
        plan, pixels, mask = plan_crop(model, target, face, (0, 0, 0, 0), size, context, grow=0, softness=feather)
        source_faces = face_mask("source", source, source_mask, source_face)
        identity = identity_pictures(source, source_faces, *pixels.shape[1:3])
        process_in = model.get_model_object("latent_format").process_in
        hidden = (mask >= MASKED).to(pixels)[..., None]
        seen = process_in(vae.encode(torch.lerp(pixels, torch.full_like(pixels, GREY), hidden)))
        small = torch.nn.functional.interpolate(hidden[..., 0][:, None], seen.shape[-2:], mode="nearest").to(seen)
        shown = process_in(vae.encode(identity)).expand_as(seen)

        def channels(prompt: list[Any], faces: Tensor) -> list[Any]:
            values = {CONCAT_KEY: torch.cat([small, seen, faces], dim=1)}
            extended: list[Any] = node_helpers.conditioning_set_values(prompt, values)
            return extended

        return io.NodeOutput(
            channels(positive, shown),
            channels(positive if negative is None else negative, torch.zeros_like(shown)),
            {"samples": vae.encode(pixels), "noise_mask": mask[:, None]},
            plan,
            identity,
        )


def check_face_swap_model(model: ModelPatcher) -> None:
    """Raise ValueError where the model does not read a mask and two pictures' latents beside its own latent."""
    wanted = 1 + 2 * int(model.get_model_object("latent_format").latent_channels)
    found = max(further_channels(model), 0)
    if found != wanted:
        raise ValueError(
            f"A face-swap model reads {wanted} channels beside its latent (a mask and two pictures); this one reads "
            f"{found}. Load a face-swap model, such as Flash Demo Models with the task face-swap. For an inpainting "
            "model use Flash Inpaint Prepare."
        )


def face_mask(name: str, picture: Tensor, mask: Tensor | None, found: object | None) -> Tensor | None:
    """Return the face's mask (1 or B, H, W) at the picture's size, or None without a mask and without boxes.

    Args:
        name: ``target`` or ``source``, for errors.
        picture: (B, H, W, C).
        mask: white where the face is. If it is not empty, the boxes are not used.
        found: a detector's boxes, see :func:`face_boxes`.

    Raises:
        ValueError: the mask belongs to another picture, or the detector found no face.
    """
    if mask is not None:
        check_numbers(f"{name}_mask", mask)
    if mask is not None and bool((mask >= MASKED).any()):
        try:
            return fitted_mask(mask, picture, padded=False)
        except ValueError as error:
            raise ValueError(f"{name}_mask does not belong to {name}. {error}") from error
    if found is None:
        return None
    batch, height, width = picture.shape[:3]
    boxes = face_boxes(name, found, batch)
    y = (torch.arange(height) + 0.5)[None, :, None]
    x = (torch.arange(width) + 0.5)[None, None, :]
    left, top, across, down = (boxes[:, index, None, None] for index in range(4))
    # The ellipse in the box: the shape of the face masks in training.
    distance = ((x - left - across / 2) / (across / 2)) ** 2 + ((y - top - down / 2) / (down / 2)) ** 2
    ellipses = (distance <= 1).to(picture)
    if not bool(ellipses.any()):
        raise ValueError(f"The box in {name}_face lies outside {name}. Connect the same picture to the detector.")
    return ellipses


def face_boxes(name: str, found: object, batch: int) -> Tensor:
    """Return each picture's largest face, (1 or ``batch``, 4): left, top, width, height in pixels.

    Args:
        name: ``target`` or ``source``, for errors.
        found: ComfyUI's BOUNDING_BOX: a box (``{"x", "y", "width", "height"}``), a list of boxes, or a list of such
            lists, one for each picture.
        batch: the number of pictures.

    Raises:
        ValueError: a picture has no face, or the boxes are for another number of pictures.
    """
    listed = [found] if isinstance(found, Mapping) else list(found) if isinstance(found, Sequence) else []
    pictures = [listed] if listed and all(isinstance(box, Mapping) for box in listed) else listed
    if len(pictures) not in (1, batch):
        raise ValueError(
            f"{name}_face has faces for {len(pictures)} pictures, but {name} has {batch}. Connect the same pictures to "
            "the detector."
        )
    largest = []
    for number, boxes in enumerate(pictures, start=1):
        valid = [box for box in boxes if box["width"] > 0 and box["height"] > 0]
        if not valid:
            raise ValueError(
                f"The detector found no face in picture {number} of {name}. Lower the detector's confidence, or paint "
                f"a mask and connect it to {name}_mask."
            )
        box = max(valid, key=lambda box: box["width"] * box["height"])
        largest.append([float(box[side]) for side in ("x", "y", "width", "height")])
    return torch.tensor(largest)


def identity_pictures(source: Tensor, faces: Tensor | None, height: int, width: int) -> Tensor:
    """Crop and resize the sources to their faces: (B, height, width, 3), as in training.

    Args:
        source: (B, H, W, C).
        faces: masks (1 or B, H, W); None if the whole pictures are faces.
        height, width: of the result.
    """
    framed = []
    for index in range(len(source)):
        picture = source[index : index + 1, ..., :3]
        face = None if faces is None else mask_box(faces[index : index + 1] if len(faces) > 1 else faces, MASKED)
        framed.append(resize(picture if face is None else crop(picture, face), height, width))
    return torch.cat(framed)
