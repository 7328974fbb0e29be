"""The inputs of Flash Distill as ComfyUI gives them: every input is a list, because core's dataset nodes give lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .schema import count

CONDITIONINGS = ("positive", "negative")


def joined(inputs: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return one value for each input: prompts, conditions and latents of a list become one text, one batch.

    Without this ComfyUI would run the node once for each entry of the longest list.

    Raises:
        ValueError: another input holds several values, or the latents differ in size.
    """
    found: dict[str, Any] = {}
    for name, values in inputs.items():
        if name == "prompts":
            found[name] = "\n".join(values)
        elif name in CONDITIONINGS:
            found[name] = [entry for conditioning in values for entry in conditioning]
        elif name == "latents":
            found[name] = _batch(values)
        elif len(values) == 1:
            found[name] = values[0]
        else:
            raise ValueError(
                f"'{name}' holds {count(len(values), 'value')}; expected 1. Lists may enter 'prompts', 'positive', "
                "'negative' and 'latents' only."
            )
    return found


def _batch(latents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the latents of a list as one LATENT."""
    samples = [latent["samples"] for latent in latents]
    sizes = sorted({tuple(one.shape[1:]) for one in samples})
    if len(sizes) != 1:
        told = ", ".join(" x ".join(map(str, size)) for size in sizes) or "no latents"
        raise ValueError(
            f"The latents must all have one size; got {told}. Bring the pictures to one size before they are encoded, "
            "for example with Resize Images by Shorter Edge and Center Crop Images."
        )
    return {**latents[0], "samples": torch.cat(samples)}
