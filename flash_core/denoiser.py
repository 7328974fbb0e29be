"""The protocol in the middle: what a backbone must offer, and the one object its conditions travel in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from .passes.asking import of_them_unconditional
from .process import Process
from .runs.transfer import sent

Role: TypeAlias = Literal["teacher", "student", "critic"]


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch of B samples. Parts that the model does not read are None.

    Attributes:
        cross_attention: (B, L, D) token embeddings.
        attention_mask: (B, L), 1 for a token, 0 for padding (PixArt).
        vector: (B, D) pooled embedding (SDXL, SD3).
        size_ids: (B, N) size and crop micro-conditioning (SDXL, PixArt-alpha).
        concat: (B, C, h, w) channels joined to the latent: masks, masked images, low-resolution images.
        image_tokens: (B, N, D) embeddings of an image, which cross-attention reads (IP-Adapter).
        hint: (B, 3, H, W) in [0, 1], the picture that a ControlNet reads: edges, poses, depth.
        noise_level: (B,) level of the noise in the low-resolution image (super-resolution).
        embedded_guidance: (B,) the guidance scale that a guidance-distilled model reads (Flux); not CFG's scale.
        residuals: adapter or ControlNet residuals, each (B, C, h, w), in the order the backbone adds them.
    """

    cross_attention: Tensor | None = None
    attention_mask: Tensor | None = None
    vector: Tensor | None = None
    size_ids: Tensor | None = None
    concat: Tensor | None = None
    image_tokens: Tensor | None = None
    hint: Tensor | None = None
    noise_level: Tensor | None = None
    embedded_guidance: Tensor | None = None
    residuals: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        tensors = [*self.residuals, *(getattr(self, name) for name in _TENSOR_FIELDS)]
        return next((len(tensor) for tensor in tensors if tensor is not None), 0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply ``function`` to every tensor."""
        parts = {name: getattr(self, name) for name in _TENSOR_FIELDS}
        return Conditioning(
            **{name: None if tensor is None else function(tensor) for name, tensor in parts.items()},
            residuals=tuple(function(tensor) for tensor in self.residuals),
        )

    def rows(self, index: Tensor) -> Conditioning:
        """Return the samples at ``index`` (b,)."""
        return self.map(lambda tensor: tensor[index.to(tensor.device)])

    def to(self, device: torch.device | str) -> Conditioning:
        """Return the same conditions on another device."""
        return self.map(lambda tensor: sent(tensor, device))

    def joined(self, other: Conditioning) -> Conditioning:
        """Join with the conditions of ``other`` for the same samples; each part is set in one of the two only."""
        both = [name for name in (*_TENSOR_FIELDS, "residuals") if _carries(self, name) and _carries(other, name)]
        if both:
            raise ValueError(f"both conditions carry {', '.join(both)}; expected each kind in one of them")
        added = {name: getattr(other, name) for name in (*_TENSOR_FIELDS, "residuals") if _carries(other, name)}
        return replace(self, **added)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches; every part must carry the same kinds of conditions."""
        first = parts[0]
        for name in _TENSOR_FIELDS:
            if len({getattr(part, name) is None for part in parts}) > 1:
                raise ValueError(f"cannot batch conditions: some carry {name!r} and some do not")
        if len({len(part.residuals) for part in parts}) > 1:
            raise ValueError("cannot batch conditions with different numbers of residuals")
        joined = {
            name: None if getattr(first, name) is None else torch.cat([getattr(part, name) for part in parts])
            for name in _TENSOR_FIELDS
        }
        residuals = tuple(torch.cat(tensors) for tensors in zip(*(part.residuals for part in parts), strict=True))
        return Conditioning(**joined, residuals=residuals)


_TENSOR_FIELDS = tuple(field.name for field in fields(Conditioning) if field.name != "residuals")


def _carries(conditioning: Conditioning, name: str) -> bool:
    value = getattr(conditioning, name)
    return value is not None and not (isinstance(value, tuple) and not value)


def unconditional_branch(
    conditioning: Conditioning, empty: Conditioning, dropped: Collection[str] = ()
) -> Conditioning:
    """Return the conditions of the unconditional branch: the empty prompt with the task's own conditions.

    Both branches see a mask, a low-resolution picture or an adapter's residuals. Guidance strengthens the parts that
    the unconditional branch lacks: the prompt, and the parts in ``dropped``.

    Args:
        conditioning: (B) the full conditions.
        empty: (B) the conditions of the empty prompt; every other part comes from ``conditioning``.
        dropped: the names of parts that become zeros.

    Raises:
        ValueError: a name in ``dropped`` is no part of the conditions.
    """
    unknown = sorted(set(dropped) - {*_TENSOR_FIELDS, "residuals"})
    if unknown:
        raise ValueError(f"conditions have no part called {', '.join(unknown)}")
    kept = {
        name: None if _carries(empty, name) or name in dropped else getattr(conditioning, name)
        for name in _TENSOR_FIELDS
    }
    zeros = {
        name: torch.zeros_like(getattr(conditioning, name))
        for name in dropped
        if name in _TENSOR_FIELDS and _carries(conditioning, name) and not _carries(empty, name)
    }
    residuals = conditioning.residuals
    if "residuals" in dropped:
        residuals = tuple(torch.zeros_like(tensor) for tensor in residuals)
    return empty.joined(Conditioning(**{**kept, **zeros}, residuals=residuals))


class Denoiser(Protocol):
    """A conditional diffusion backbone whose roles share ONE frozen base.

    Latents come and go as float32; a backbone casts inside. Gradients flow from outputs to ``z_t`` in every role, and
    to the adapter that the role switches on. The roles: ``teacher`` is the base (with a frozen style LoRA, if any),
    ``student`` has the student's LoRA on, ``critic`` the critic's.
    """

    @property
    def process(self) -> Process:
        """The noise process of the model."""
        ...

    def predict(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's output (B, C, H, W) at latents (B, C, H, W) and timesteps (B,), in the current role."""
        ...

    def features(self, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Return hidden states of several depths as maps (B, C_i, H_i, W_i), in the current role."""
        ...

    def role(self, role: Role) -> AbstractContextManager[None]:
        """Switch to ``role`` inside the block, and back to the previous one after it."""
        ...


def predict_z0(denoiser: Denoiser, z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the predicted clean latent at ``(z_t, t)``, in the current role."""
    return denoiser.process.z0_from_output(z_t, denoiser.predict(z_t, t, conditioning), t)


def guided_z0(
    denoiser: Denoiser,
    z_t: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    guidance: Tensor,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Classifier-free guidance, ``uncond + w (cond - uncond)``, both branches in one batch.

    z0 is affine in the output for a given ``(z_t, t)``, so guiding z0 and guiding the output are the same thing.

    Args:
        guidance: (B,) the scale w of each sample; 1 is no guidance.
        rows: the samples that are guided; the others have no unconditional pass. None guides all.
    """
    if rows is None or len(rows) == len(z_t):
        with of_them_unconditional(len(z_t)):
            both = predict_z0(
                denoiser, torch.cat([z_t, z_t]), torch.cat([t, t]), Conditioning.cat([conditioning, unconditional])
            )
        with_condition, without = both.chunk(2)
        return without + guidance.reshape(-1, 1, 1, 1) * (with_condition - without)
    if not rows:
        return predict_z0(denoiser, z_t, t, conditioning)
    index = torch.tensor(list(rows), device=z_t.device)
    with of_them_unconditional(len(rows)):
        both = predict_z0(
            denoiser,
            torch.cat([z_t, z_t[index]]),
            torch.cat([t, t[index]]),
            Conditioning.cat([conditioning, unconditional.rows(index)]),
        )
    with_condition, without = both[: len(z_t)], both[len(z_t) :]
    guided = without + guidance[index].reshape(-1, 1, 1, 1) * (with_condition[index] - without)
    return with_condition.index_copy(0, index, guided)
