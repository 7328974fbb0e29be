"""Make training pairs for the demo's face-swap: the face of one emoji on the head of another, with mask and identity.

A model that only puts a picture's own face back learns to guess the face from the rest of the head, above all where it
knows each head by heart. Emoji have one place and size, so here, unlike with photographs, faces can be exchanged by
arithmetic: paste an ellipse, and recolour its skin to the head's. The result is what the model should draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seeds import stream
from .shards import load_pictures

CENTRE = 0.5  # of the face, from left and from top, as a share of the size
RADIUS = (0.38, 0.40)  # of the pasted ellipse, across and down, as shares of the size
SEAM = 0.06  # width over which the pasted face fades into the head, as a share of the radius
MASK_GROWTH = (1.0, 1.12)  # radius of the mask / radius of the pasted ellipse
RING = 0.92  # the ellipse's border, where the skin's colour is taken, begins at this share of the radius
PLAIN = "smiling face with smiling eyes"  # a head with nothing on its border; plain faces resemble it there
PLAIN_DIFFERENCE = 0.3  # of colours in [-1, 1], on the plainer PLAIN_SHARE of the border
PLAIN_SHARE = 0.7
SKIN_SPREAD = 0.5  # squared distance of colours between skin and eyes or mouth
BACKGROUND = 0.85  # colours above this value are the white around a head
IDENTITY_REACH = (0.95, 1.2)  # half side of an identity picture / radius of the ellipse
IDENTITY_SHIFT = 0.05
FACES, HEADS = "smiley face", ("smiley face", "animal face", "cartoon cat", "cartoon monkey", "fantasy creature")


@dataclass(frozen=True)
class Swap:
    """A face on another head.

    Attributes:
        name: for messages, of face and head.
        head, face: names of the subjects.
        image: (3, H, W) in [-1, 1], the face on the head, which a model should draw.
        mask: (1, H, W), 1 where the face was put.
        identity: (3, H, W) in [-1, 1], the face alone, filling the frame.
    """

    name: str
    head: str
    face: str
    image: Tensor
    mask: Tensor
    identity: Tensor


def swaps(seed: int = 0) -> Iterator[Swap]:
    """Yield every plain face on every head. Order, masks and identity pictures depend on ``seed``."""
    pictures = load_pictures()
    images = pictures.images.float() / 127.5 - 1
    captions = pictures.captions
    distance = _ellipse(images.shape[-1])
    ring = (distance < 1) & (distance > RING**2)
    border = images[:, :, ring]
    plain = border[[caption.name for caption in captions].index(PLAIN)]
    difference = (border - plain).abs().mean(1).quantile(PLAIN_SHARE, dim=1)
    faces = [i for i, caption in enumerate(captions) if caption.general == FACES and difference[i] < PLAIN_DIFFERENCE]
    heads = [i for i, caption in enumerate(captions) if caption.general in HEADS]
    pairs = [(head, face) for head in heads for face in faces if head != face]
    generator = stream(seed, "swaps")
    for index in torch.randperm(len(pairs), generator=generator).tolist():
        head, face = pairs[index]
        low, high = MASK_GROWTH
        growth = low + (high - low) * float(torch.rand((), generator=generator))
        names = captions[head].name, captions[face].name
        yield Swap(
            f"the face of {names[1]!r} on {names[0]!r}",
            *names,
            image=paste_face(images[head], images[face], distance, ring),
            mask=(distance < growth**2).float()[None],
            identity=_identity(images[face], generator),
        )


def paste_face(head: Tensor, face: Tensor, distance: Tensor, ring: Tensor) -> Tensor:
    """Return ``head`` (3, H, W) with ``face`` (3, H, W) inside the ellipse, in the head's skin colour.

    Args:
        distance: (H, W) squared, from the ellipse's centre; 1 at its border.
        ring: (H, W) where skin colours are taken.
    """
    around = head[:, ring]
    skin = face[:, ring].median(1).values[:, None, None]
    target = around[:, around.amin(0) < BACKGROUND].median(1).values[:, None, None]
    is_skin = torch.exp(-((face - skin) ** 2).sum(0) / SKIN_SPREAD)
    weight = ((1 - distance) / (2 * SEAM)).clamp(0, 1)
    return (head * (1 - weight) + (face + is_skin * (target - skin)) * weight).clamp(-1, 1)


def _ellipse(size: int) -> Tensor:
    place = (torch.arange(size) + 0.5) / size - CENTRE
    return (place[None, :] / RADIUS[0]) ** 2 + (place[:, None] / RADIUS[1]) ** 2


def _identity(face: Tensor, generator: torch.Generator) -> Tensor:
    low, high = IDENTITY_REACH
    reach = low + (high - low) * float(torch.rand((), generator=generator))
    shift = (torch.rand(2, generator=generator) * 2 - 1) * IDENTITY_SHIFT
    theta = torch.zeros(1, 2, 3)
    for axis in (0, 1):
        theta[0, axis, axis] = 2 * RADIUS[axis] * reach
        theta[0, axis, 2] = 2 * CENTRE - 1 + shift[axis]
    grid = F.affine_grid(theta, [1, *face.shape], align_corners=False)
    moved = F.grid_sample(face[None], grid, mode="bicubic", padding_mode="border", align_corners=False)
    return moved[0].clamp(-1, 1)
