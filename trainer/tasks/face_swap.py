"""Face-swap: a face from one picture onto the head of another, with models that read both as further channels.

There are no pairs of pictures to learn from, so a model learns to put a picture's own face back: the face region is
masked, and the same face, moved, scaled, mirrored and recoloured so that it can't be copied pixel for pixel, is shown
beside it. In use the face comes from elsewhere. Use it for pictures that one has the right to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...flash_core.denoiser import Conditioning
from ..config import Section
from ..errors import UserError
from .base import Task
from .figures import Figure, Scene
from .inpainting import black_and_white, inpainting_channels, masked_pictures, put_back
from .scores import cosine, distance, psnr, seam

if TYPE_CHECKING:
    from ..teachers.base import Teacher

Share = Annotated[float, Field(gt=0, lt=1)]
JITTER = 0.06  # of the region's place and size, as a share of the picture
IDENTITY_ZOOM = (0.85, 1.3)  # of the face in the identity picture, relative to filling it
IDENTITY_SHIFT = 0.12
IDENTITY_COLOUR = 0.15  # of brightness and of each colour


class FaceSwapOptions(Section):
    """The place of faces in the training pictures, which must be aligned."""

    centre: tuple[Share, Share] = Field(
        (0.5, 0.5), description="centre of the face from left and top, as shares of the size"
    )
    radius: tuple[Share, Share] = Field(
        (0.3, 0.35), description="radii of the face's ellipse, across and down, as shares of the size"
    )
    identity: Literal["channels", "tokens", "both"] = Field(
        "channels",
        description="how the model sees the identity picture: as latents in further channels, as tokens that an "
        "IP-Adapter (model.image_adapter) reads, or both",
    )


class FaceSwap(Task):
    """Replace the masked face of a target by the face of another picture.

    The channels, in order: the mask at the latent's size, the latents of the target with mid-grey under the mask, the
    latents of the identity picture, in which the face fills the frame. With ``identity: tokens`` cross-attention reads
    the identity picture, and the channels are an inpainting model's. Captions are not used. Guidance strengthens the
    identity: in the unconditional branch its channels are 0, and its tokens are those of no picture.
    """

    name = "face-swap"
    options_class: ClassVar[type[Section]] = FaceSwapOptions
    options: FaceSwapOptions
    companions = ("mask", "identity")
    reads_text = False
    figures = (
        Figure(
            "identity",
            "Identity",
            "identity",
            "d(target) / (d(target) + d(source)): d is the distance from the result’s face to the target’s or the "
            "source’s face, in feature space. 1 = source’s face, 0 = target’s face, 0.5 = neither.",
            higher_is_better=True,
        ),
        Figure(
            "source",
            "Likeness to the source’s face",
            "source",
            "Cosine between the features of the result’s face and of the source’s face.",
            higher_is_better=True,
        ),
        Figure(
            "own",
            "Likeness to the target’s face",
            "own",
            "Cosine between the features of the result’s face and of the target’s masked face. If it is above the "
            "likeness to the source, the face was not swapped.",
            higher_is_better=False,
        ),
        Figure(
            "outside",
            "Preservation of the target",
            "outside",
            "PSNR between the model’s picture and the target outside the mask, before the face is pasted into the "
            "target (after that, these pixels are the target’s).",
            higher_is_better=True,
            unit="dB",
        ),
        Figure(
            "seam",
            "Seam visibility",
            "seam",
            "Colour step across the mask’s border in the result, relative to the target near the border. 1 = no seam.",
            higher_is_better=False,
        ),
    )
    demo_captions = ("smiley face",)

    def extra_channels(self, latent_channels: int) -> int:
        """Return the channels of the mask and both pictures' latents; with ``tokens`` of mask and target."""
        return 1 + latent_channels * (1 if self.options.identity == "tokens" else 2)

    @property
    def gives_image_tokens(self) -> bool:
        """Return True if attention reads the identity."""
        return self.options.identity != "channels"

    def draw(self, images: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``mask`` of the face, ``masked`` (the target, grey under the mask), and ``identity``, a changed face.

        A companion mask or identity (another picture of the same person) is used if there is one.
        """
        masks = companions.get("mask")
        if masks is None:
            height, width = images.shape[-2:]
            masks = self.face_masks(len(images), (height, width), generator).to(images)
        masks = black_and_white(masks)
        faces = companions.get("identity")
        if faces is None:
            faces = self.identity_pictures(images, generator)
        return {"mask": masks, "masked": masked_pictures(images, masks), "identity": faces}

    def encode(self, drawn: Mapping[str, Tensor], teacher: Teacher) -> Conditioning:
        """Return the extra channels and the tokens."""
        concat = inpainting_channels(drawn["masked"], drawn["mask"], teacher)
        tokens = None
        if self.gives_image_tokens:
            if teacher.image_adapter is None:
                raise UserError(
                    f"task.options.identity: {self.options.identity!r} needs an IP-Adapter, which {teacher.name} "
                    "lacks; set model.image_adapter, or identity to 'channels'"
                )
            tokens = teacher.image_adapter.tokens(drawn["identity"])
        if self.options.identity != "tokens":
            concat = torch.cat([concat, teacher.encode(drawn["identity"])], dim=1)
        return Conditioning(concat=concat, image_tokens=tokens)

    def unconditional(self, conditioning: Conditioning, empty: Conditioning) -> Conditioning:
        """Return the conditions of the target without the identity."""
        branch = super().unconditional(conditioning, empty)
        if self.options.identity == "tokens":
            return branch
        assert branch.concat is not None
        concat = branch.concat.clone()
        latent_channels = (concat.shape[1] - 1) // 2
        concat[:, -latent_channels:] = 0
        return replace(branch, concat=concat)

    def draw_for_evaluation(
        self, images: Tensor, others: Tensor, companions: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Draw a real swap: the identity comes from another picture, not from a companion."""
        return {**self.draw(images, companions, generator), "identity": self.faces(others)}

    def finished(self, made: Tensor, scene: Scene) -> Tensor:
        """Paste the face back into the target."""
        return put_back(made, scene)

    def scores(self, made: Tensor, scene: Scene) -> dict[str, Tensor]:
        """Return the measures of identity, and of the picture outside the mask."""
        result = put_back(made, scene)
        pictures = (result, scene.others, scene.originals)
        face, source, own = (scene.look(self.faces(images).clamp(0, 1)) for images in pictures)
        from_source, from_own = distance(face, source), distance(face, own)
        return {
            "identity": from_own / (from_own + from_source).clamp(min=1e-12),
            "source": cosine(face, source),
            "own": cosine(face, own),
            "outside": psnr(made, scene.originals, scene.drawn["mask"] < 0.5),
            "seam": seam(result, scene.originals, scene.drawn["mask"]),
        }

    def shown(self, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masked target and the source's face."""
        return {"target": drawn["masked"] / 2 + 0.5, "identity": (drawn["identity"] / 2 + 0.5).clamp(0, 1)}

    def faces(self, images: Tensor) -> Tensor:
        """Return the faces of pictures (B, 3, H, W), filling the frame, as the nodes crop them."""
        theta = torch.zeros(len(images), 2, 3).to(images)
        for axis in (0, 1):
            theta[:, axis, axis] = 2 * self.options.radius[axis]
            theta[:, axis, 2] = 2 * self.options.centre[axis] - 1
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)

    def face_masks(self, batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Return elliptic masks (B, 1, H, W) of the faces, each a little different."""
        height, width = size
        shaken = torch.rand(batch, 4, generator=generator) * 2 * JITTER - JITTER
        x = (torch.arange(width) + 0.5) / width
        y = (torch.arange(height) + 0.5) / height
        centre_x, centre_y = ((self.options.centre[axis] + shaken[:, axis]).reshape(-1, 1, 1) for axis in (0, 1))
        across, down = ((self.options.radius[axis] + shaken[:, 2 + axis]).reshape(-1, 1, 1) for axis in (0, 1))
        distance = ((x[None, None, :] - centre_x) / across) ** 2 + ((y[None, :, None] - centre_y) / down) ** 2
        return (distance <= 1).float()[:, None]

    def identity_pictures(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the faces (B, 3, H, W), filling the frame, randomly moved, mirrored and recoloured."""
        batch = len(images)

        def draw(low: float, high: float, *shape: int) -> Tensor:
            return (torch.rand(batch, *shape, generator=generator) * (high - low) + low).to(images)

        zoom = draw(*IDENTITY_ZOOM)
        mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
        shift = draw(-IDENTITY_SHIFT, IDENTITY_SHIFT, 2)
        theta = torch.zeros(batch, 2, 3, device=images.device, dtype=images.dtype)
        for axis in (0, 1):
            # What the frame shows, in units of half the picture: the face's ellipse, over the zoom.
            reach = 2 * self.options.radius[axis] / zoom
            theta[:, axis, axis] = reach * (mirror if axis == 0 else 1)
            theta[:, axis, 2] = 2 * self.options.centre[axis] - 1 + shift[:, axis] * reach
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
        strength, tint = (draw(-IDENTITY_COLOUR, IDENTITY_COLOUR, channels, 1, 1) for channels in (1, 3))
        gain = 1 + strength + tint / 2
        return (((moved + 1) * gain) - 1).clamp(-1, 1)
