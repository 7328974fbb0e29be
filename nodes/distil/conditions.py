"""Convert CONDITIONING to the method's :class:`~..flash_core.denoiser.Conditioning`, and back to a model's arguments.

ComfyUI's ``extra_conds`` returns the network's inputs for a CONDITIONING: tokens, a vector, sizes, channels. Each input
has one field in Conditioning, so the method can select, join and guide batches of any architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch
import torch.nn.functional as F
from torch import Tensor

from ...flash_core.denoiser import Conditioning

# ComfyUI's name of each condition, and our field. "vector" is the pooled text as ComfyUI's models embed it: for SDXL
# with the embedded sizes after it.
FIELDS = {
    "c_crossattn": "cross_attention",
    "attention_mask": "attention_mask",
    "y": "vector",
    "c_concat": "concat",
    "guidance": "embedded_guidance",
}

# PixArt's two size conditions share one field: (height, width, aspect ratio).
SIZES = {"c_size": 2, "c_ar": 1}

# Lumina and Z-Image are told how many tokens the prompt has. A batch is split by this number anyway.
TOKEN_COUNT = "num_tokens"

# Entries that limit a CONDITIONING to a part of the picture or of the sampling, or that depend on the noisy latent.
PARTIAL = ("area", "mask", "gligen", "control", "hooks", "start_percent", "end_percent", "default")


def read_conditionings(
    model: Any, conditionings: dict[str, list[Any]], latent_shape: tuple[int, ...], device: torch.device
) -> list[Conditioning]:
    """Return the network's inputs for each CONDITIONING. Each row of an entry's tokens is one sample.

    Token sequences of different lengths are padded at their end; ``attention_mask`` holds their lengths.

    Args:
        model: ComfyUI's ``BaseModel``.
        conditionings: by ComfyUI's role (``positive``, ``negative``); some models treat the roles differently.
        latent_shape: (C, h, w) of the latents to denoise.
        device: of the result.

    Raises:
        ValueError: a condition cannot be distilled; the message names the condition.
    """
    samples = {
        role: [_read_entry(model, entry, role, latent_shape, device) for entry in entries]
        for role, entries in conditionings.items()
    }
    tokens = [part.cross_attention for parts in samples.values() for part in parts if part.cross_attention is not None]
    lengths = {part.shape[1] for part in tokens}
    if len(lengths) > 1:
        samples = {role: [_padded(part, max(lengths)) for part in parts] for role, parts in samples.items()}
    for role, parts in samples.items():
        if not parts:
            raise ValueError(f"The {role} CONDITIONING is empty. Connect a CLIP Text Encode.")
    return [Conditioning.cat(parts) for parts in samples.values()]


def _read_entry(
    model: Any, entry: list[Any], role: str, latent_shape: tuple[int, ...], device: torch.device
) -> Conditioning:
    partial = [name for name in PARTIAL if entry[1].get(name) is not None]
    if partial:
        raise ValueError(
            f"This CONDITIONING has {', '.join(partial)}, which cannot be distilled: a condition must hold for the "
            "whole picture and for all steps. Connect the text encoder directly."
        )
    rows = 1 if entry[0] is None else len(entry[0])
    empty = torch.zeros(rows, *latent_shape, device=device)
    converted = comfy.sampler_helpers.convert_cond([entry])
    (encoded,) = comfy.samplers.encode_model_conds(
        model.extra_conds, converted, empty, device, role, latent_image=empty, denoise_mask=None, seed=0
    )
    parts: dict[str, Tensor] = {}
    for name, condition in encoded["model_conds"].items():
        if name == TOKEN_COUNT:
            continue
        value = condition.process_cond(batch_size=rows, area=None).cond
        if not isinstance(value, Tensor) or name not in (*FIELDS, *SIZES):
            raise ValueError(
                f"{type(model).__name__} is conditioned on {name!r}, which cannot be distilled; expected only "
                f"{', '.join((*FIELDS, *SIZES))}. Use a model without this condition."
            )
        # A copy: a backward pass cannot use tensors from ComfyUI's nodes, which run in inference mode.
        parts[name] = value.to(device, torch.float32 if value.is_floating_point() else value.dtype, copy=True)
    sizes = [parts[name] for name in SIZES if name in parts]
    inputs: dict[str, Any] = {FIELDS[name]: value for name, value in parts.items() if name in FIELDS}
    return Conditioning(**inputs, size_ids=torch.cat(sizes, 1) if sizes else None)


def _padded(part: Conditioning, length: int) -> Conditioning:
    """Pad tokens at the end to ``length``, and add the mask."""
    tokens = part.cross_attention
    if tokens is None or part.attention_mask is not None:
        raise ValueError(
            "These CONDITIONINGs have token sequences of different lengths and their own masks. Encode prompts of "
            "similar lengths, or one prompt at a time."
        )
    mask = tokens.new_ones(tokens.shape[:2])
    missing = length - tokens.shape[1]
    return replace(part, cross_attention=F.pad(tokens, (0, 0, 0, missing)), attention_mask=F.pad(mask, (0, missing)))


def by_token_count(conditioning: Conditioning) -> Iterator[tuple[Tensor | None, Conditioning]]:
    """Split a batch into groups of samples with equally many tokens, without padding and mask.

    ComfyUI's networks take no mask for padding, so ComfyUI also evaluates samples of different lengths separately.

    Yields:
        ``(rows, conditions)``: rows (b,), or None for all rows.
    """
    mask = conditioning.attention_mask
    if mask is None or mask.ndim != 2 or conditioning.cross_attention is None:
        yield None, conditioning
        return
    counts = (mask > 0.5).sum(1)
    if not torch.equal(mask > 0.5, torch.arange(mask.shape[1], device=mask.device) < counts[:, None]):
        raise ValueError("An attention_mask must be 1 for a sample's first tokens and 0 for the rest.")
    distinct = counts.unique().tolist()
    for count in distinct:
        rows = None if len(distinct) == 1 else (counts == count).nonzero()[:, 0]
        part = conditioning if rows is None else conditioning.rows(rows)
        assert part.cross_attention is not None
        yield rows, replace(part, cross_attention=part.cross_attention[:, :count], attention_mask=None)


def model_arguments(conditioning: Conditioning) -> dict[str, Tensor]:
    """Return the keyword arguments of ``BaseModel.apply_model`` for a batch of conditions.

    Raises:
        ValueError: a kind of condition that ComfyUI MODELs do not have.
    """
    known = (*FIELDS.values(), "size_ids")
    others = [field.name for field in fields(conditioning) if field.name not in known]
    values = {name: getattr(conditioning, name) for name in others}
    given = [name for name, value in values.items() if value is not None and len(value) > 0]
    if given:
        raise ValueError(
            f"A ComfyUI MODEL cannot be distilled with {', '.join(given)}; expected only {', '.join(known)}. Remove "
            "the other conditions."
        )
    arguments = {name: getattr(conditioning, field) for name, field in FIELDS.items()}
    if conditioning.size_ids is not None:
        arguments |= dict(zip(SIZES, conditioning.size_ids.split(list(SIZES.values()), 1), strict=True))
    return {name: value for name, value in arguments.items() if value is not None}
