"""Face-swap: the face of one picture onto the head of another, for concat models that read both."""

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
from ..shared.inputs import check_numbers, check_picture
from ..shared.model_facts import CONCAT_KEY, check_prompts, check_vae, native_side
from ..shared.schema import node_schema
from .concat import free_channels
from .inpaint import Stitch, context_input, feather_input, fitted_mask, plan_crop, size_input

GREY = 0.5  # what the model sees where the face was, as in training
MASKED = 0.5  # of a soft mask: what counts as masked, as in training
FRAMING = 1.6  # a training picture's sides are 1.7 and 1.4 times its face's

# What detectors give in ComfyUI 0.33; 0.3.75 has no node that makes it, so there the sockets stay free.
BoundingBoxes = io.Custom("BOUNDING_BOX")

# The mark of a swapped picture. ComfyUI writes the graph that made a picture into its file, with every value, whether
# a node ran or was cached; a node's own entry (extra_pnginfo) would be missing wherever the node was cached. As the
# only choice of a required input it can't be left out.
NOTICE = "A face is swapped here by Flash Diffusion. Only for pictures that one has the right to change."


class FlashFaceSwapPrepare(io.ComfyNode):
    """Two pictures and where their faces are to what a face-swap model reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def detected(name: str, whose: str) -> io.Input:
            return BoundingBoxes.Input(
                name,
                optional=True,
                tooltip=f"In place of a mask: {whose} face as a detector found it, such as ComfyUI's Detect Face "
                "Landmarks. Of several faces the largest counts.",
                extra_dict={"forceInput": True},
            )

        return node_schema(
            node_id="FlashFaceSwapPrepare",
            display_name="Flash Face Swap Prepare",
            search_aliases=["face swap", "reactor", "identity", "deepfake", "flash diffusion"],
            description="Hides the target's face and shows the model another one. Only for pictures that you have the "
            "right to change.",
            inputs=[
                io.Model.Input("model", tooltip="A face-swap model: it reads a mask and two pictures as channels."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt; face-swap models are trained with an empty one."
                ),
                io.Image.Input(
                    "target", tooltip="The picture whose face is replaced. One that you have the right to change."
                ),
                io.Image.Input("source", tooltip="The picture whose face is put in. Its person must agree."),
                size_input(),
                context_input("the face", FRAMING),
                feather_input(
                    8, "Pixels outside the mask over which the new face and the picture fade into each other."
                ),
                io.Combo.Input(
                    "notice",
                    options=[NOTICE],
                    tooltip="Saved with the graph in the metadata of every picture that this graph makes.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="White where the target's face is: painted, or from any detector that makes masks.",
                ),
                detected("target_face", "the target's"),
                io.Mask.Input(
                    "source_mask",
                    optional=True,
                    tooltip="White where the source's face is. Without one the whole source counts as the face.",
                ),
                detected("source_face", "the source's"),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="For a guidance above 1; where it is not connected, the prompt takes its place.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with mask, target and identity."),
                io.Conditioning.Output(
                    display_name="negative",
                    tooltip="The same without the identity: a guidance above 1 strengthens the likeness.",
                ),
                io.Latent.Output(display_name="latent", tooltip="The crop with its noise mask: connect Flash Sampler."),
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
        """Crop the target, hide its face, encode what the model reads."""
        if notice != NOTICE:  # which ComfyUI 0.3.75 does not check itself
            raise ValueError(f"The notice is {notice!r}; expected {NOTICE!r}. It is the mark of swapped pictures.")
        check_vae(vae, model)
        check_face_swap_model(model)
        check_prompts(model, positive=positive, negative=negative)
        for name, picture in (("target", target), ("source", source)):
            check_picture(name, picture)
            check_numbers(name, picture)
        if len(source) not in (1, len(target)):
            raise ValueError(
                f"There are {len(source)} sources for {len(target)} targets. Give one source for all of them, or one "
                "for each."
            )
        face = face_mask("target", target, target_mask, target_face)
        if face is None:
            raise ValueError(
                "Where the target's face is, nothing says: "
                + ("no mask is connected" if target_mask is None else "the mask is empty")
                + ". Paint one (right-click the picture of Load Image: Open in MaskEditor), or connect a detector's "
                "mask to 'target_mask' or its boxes to 'target_face'. White is the face; a mask the other way round "
                "needs Invert Mask."
            )
        plan, pixels, mask = plan_crop(
            target, face, (0, 0, 0, 0), size or native_side(model), context, grow=0, softness=feather
        )
        source_faces = face_mask("source", source, source_mask, source_face)
        identity = identity_pictures(source, source_faces, *pixels.shape[1:3])
        process_in = model.get_model_object("latent_format").process_in
        hidden = (mask >= MASKED).to(pixels)[..., None]
        seen = process_in(vae.encode(torch.lerp(pixels, torch.full_like(pixels, GREY), hidden)))
        small = torch.nn.functional.interpolate(hidden[..., 0][:, None], seen.shape[-2:], mode="nearest").to(seen)
        shown = process_in(vae.encode(identity)).expand_as(seen)

        def channels(prompt: list[Any], faces: Tensor) -> list[Any]:
            return node_helpers.conditioning_set_values(prompt, {CONCAT_KEY: torch.cat([small, seen, faces], dim=1)})

        return io.NodeOutput(
            channels(positive, shown),
            channels(positive if negative is None else negative, torch.zeros_like(shown)),
            {"samples": vae.encode(pixels), "noise_mask": mask[:, None]},
            plan,
            identity,
        )


def check_face_swap_model(model: ModelPatcher) -> None:
    """Raise where a model does not read a mask and two pictures' latents beside its own."""
    wanted = 1 + 2 * int(model.get_model_object("latent_format").latent_channels)
    found = max(free_channels(model), 0)
    if found != wanted:
        raise ValueError(
            f"A face-swap model reads {wanted} channels beside its latent (a mask and two pictures), this one reads "
            f"{found}. Load a face-swap model, such as Flash Demo Models with the task face-swap; for a mask and one "
            "picture there is Flash Inpaint Prepare."
        )


def face_mask(name: str, picture: Tensor, mask: Tensor | None, found: object | None) -> Tensor | None:
    """Where a face is, (1 or B, H, W) at the picture's size; None where nothing says it.

    Args:
        name: whose, for errors.
        picture: (B, H, W, C).
        mask: white where it is; comes first, unless it is empty.
        found: a detector's boxes, see :func:`face_boxes`.

    Raises:
        ValueError: the mask is another picture's, or the detector found no face.
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
    # The ellipse in the box, the shape that faces are masked with in training.
    distance = ((x - left - across / 2) / (across / 2)) ** 2 + ((y - top - down / 2) / (down / 2)) ** 2
    ellipses = (distance <= 1).to(picture)
    if not bool(ellipses.any()):
        raise ValueError(f"The box in {name}_face lies outside the picture. Let the detector look at the same picture.")
    return ellipses


def face_boxes(name: str, found: object, batch: int) -> Tensor:
    """The largest face of each picture, (1 or ``batch``, 4): left, top, width, height in pixels.

    Args:
        found: ComfyUI's BOUNDING_BOX: a box (``{"x", "y", "width", "height"}``), a list of them, or a list of such
            lists, one for each picture.

    Raises:
        ValueError: none for a picture, or boxes for another number of pictures.
    """
    listed = [found] if isinstance(found, Mapping) else list(found) if isinstance(found, Sequence) else []
    pictures = [listed] if listed and all(isinstance(box, Mapping) for box in listed) else listed
    if len(pictures) not in (1, batch):
        raise ValueError(
            f"{name}_face has faces for {len(pictures)} pictures, and {name} has {batch}. Let the detector look at the "
            "same pictures."
        )
    largest = []
    for number, boxes in enumerate(pictures, start=1):
        valid = [box for box in boxes if box["width"] > 0 and box["height"] > 0]
        if not valid:
            raise ValueError(
                f"The detector found no face in picture {number} of {name}. Lower its confidence, or paint a mask and "
                f"connect it to {name}_mask."
            )
        box = max(valid, key=lambda box: box["width"] * box["height"])
        largest.append([float(box[side]) for side in ("x", "y", "width", "height")])
    return torch.tensor(largest)


def identity_pictures(source: Tensor, faces: Tensor | None, height: int, width: int) -> Tensor:
    """The sources' faces filling a frame each, (B, height, width, 3), as training shows them.

    Args:
        source: (B, H, W, C).
        faces: (1 or B, H, W); None: the whole pictures are faces.
    """
    framed = []
    for index in range(len(source)):
        picture = source[index : index + 1, ..., :3]
        face = None if faces is None else mask_box(faces[index : index + 1] if len(faces) > 1 else faces, MASKED)
        framed.append(resize(picture if face is None else crop(picture, face), height, width))
    return torch.cat(framed)
