"""Encode a list of prompts, and check that prompts belong to the MODEL: their widths and their input channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.utils
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from .model_facts import CONCAT_KEY, describe_model, further_channels

POOLED_KEY = "pooled_output"  # ComfyUI's name in a conditioning

# The layers of transformers that read the text's embeddings and the pooled embedding. The classes are ComfyUI's own:
# derived classes may change the text before.
TEXT_READERS = {
    "SD3": "context_embedder",
    "PixArt": "y_embedder.y_proj.fc1",
    "Flux": "txt_in",
    "Chroma": "txt_in",
    "AuraFlow": "cond_seq_linear",
    "Lumina2": "cap_embedder.1",
}
POOLED_READERS = {"SD3": "y_embedder.mlp.0", "Flux": "vector_in.in_layer"}
# How many sizes these UNets read in the vector beside the pooled embedding.
UNET_SIZES = {"SDXL": 6, "SDXLRefiner": 5}


def text_width(model: ModelPatcher) -> int | None:
    """Return the width of the text embeddings that the model reads; None for models whose text ComfyUI changes."""
    inner = model.model
    if not isinstance(inner.diffusion_model, UNetModel):
        return _read_width(inner, TEXT_READERS)
    if type(inner).extra_conds is not comfy.model_base.BaseModel.extra_conds:
        return None
    width: int | None = inner.model_config.unet_config.get("context_dim")
    return width


def pooled_width(model: ModelPatcher) -> int | None:
    """Return the width of the pooled embedding that the model reads; None without one, or for an unknown class."""
    inner = model.model
    sizes = UNET_SIZES.get(type(inner).__name__)
    if sizes is None:
        return _read_width(inner, POOLED_READERS)
    vector = inner.model_config.unet_config.get("adm_in_channels")
    return None if vector is None else int(vector) - sizes * int(inner.embedder.dim)


def _read_width(inner: Any, readers: dict[str, str]) -> int | None:
    """Return the input width of the layer that ``readers`` names for the model's class."""
    kind = type(inner)
    if getattr(comfy.model_base, kind.__name__, None) is not kind or kind.__name__ not in readers:
        return None
    try:
        layer = comfy.utils.get_attr(inner.diffusion_model, readers[kind.__name__])
    except AttributeError:
        return None
    width: int | None = getattr(layer, "in_features", None)
    return width


def check_prompts(model: ModelPatcher, **prompts: list[Any] | None) -> None:
    """Raise ValueError where a connected prompt is empty or was encoded for another model.

    ComfyUI itself makes a grey picture of an empty prompt, and ends with an error of matrix shapes for another model's
    prompt.

    Args:
        prompts: by the name of the input.
    """
    width, pooled = text_width(model), pooled_width(model)
    for name, prompt in prompts.items():
        if prompt is not None and not prompt:
            raise ValueError(
                f"The conditioning at '{name}' holds no prompt: its list is empty. Connect a CLIP Text Encode; its "
                "text may be empty."
            )
        for tokens, entries in prompt or []:
            if width is not None and tokens is not None and tokens.shape[-1] != width:
                raise ValueError(_other_model(model, name, f"its text embeddings are {tokens.shape[-1]} wide", width))
            if pooled is not None:
                _check_pooled(model, name, entries, pooled)


def _check_pooled(model: ModelPatcher, name: str, entries: dict[str, Any], width: int) -> None:
    """Raise ValueError where the model cannot read the prompt's pooled embedding."""
    if "unclip_conditioning" in entries:  # ComfyUI makes the embedding of a picture
        return
    found = entries.get(POOLED_KEY)
    if found is not None and found.shape[-1] != width:
        raise ValueError(_other_model(model, name, f"its pooled embedding is {found.shape[-1]} wide", width))
    # Transformers read an empty one as no embedding.
    if POOLED_KEY not in entries or (found is None and isinstance(model.model.diffusion_model, UNetModel)):
        raise ValueError(_other_model(model, name, "it has no pooled embedding", width))


def _other_model(model: ModelPatcher, name: str, found: str, width: int) -> str:
    described = describe_model(model)
    reads = "" if f" {width} channels" in described else f", which reads {width}"
    return (
        f"The prompt at '{name}' was encoded for another model: {found}; the model is {described}{reads}. Encode the "
        "prompt with the CLIP that belongs to the model."
    )


def check_channels(model: ModelPatcher, shape: Sequence[int], **prompts: list[Any] | None) -> None:
    """Raise ValueError where the prompts do not bring the input channels that the model reads beside its latent.

    Args:
        shape: of the latent to sample, (B, C, H, W).
        prompts: by the name of the input.
    """
    if not knows_channels(model):
        return
    reads = further_channels(model)
    height, width = shape[-2:]
    for name, prompt in prompts.items():
        for _, entries in prompt or []:
            brought = entries.get(CONCAT_KEY)
            if brought is None:
                if reads > 0 and not fills_channels(model):
                    raise ValueError(
                        f"This model reads {reads} channels beside its latent, but the prompt at '{name}' brings none. "
                        "Attach them with Flash Concat Conditioning (a face-swap model: Flash Face Swap Prepare), or "
                        "load an ordinary model."
                    )
                continue
            if brought.shape[1] != reads:
                raise ValueError(
                    f"This model reads {reads} channels beside its latent, but the prompt at '{name}' brings "
                    f"{brought.shape[1]}. Make the channels for this model with Flash Concat Conditioning, or connect "
                    "the prompt without them."
                )
            if tuple(brought.shape[-2:]) != (height, width):
                raise ValueError(
                    f"The prompt at '{name}' has input channels for a latent of {brought.shape[-1]} x "
                    f"{brought.shape[-2]}; this latent is {width} x {height}. Connect one latent to the node that "
                    "makes the channels and to this node."
                )


def knows_channels(model: ModelPatcher) -> bool:
    """Return whether ComfyUI's configuration counts the model's input channels as the latent does, not per patch."""
    known = (comfy.model_base.SD3, comfy.model_base.PixArt, comfy.model_base.Flux)
    return isinstance(model.model.diffusion_model, UNetModel) or isinstance(model.model, known)


def fills_channels(model: ModelPatcher) -> bool:
    """Return whether ComfyUI fills the further channels itself, as for inpainting models."""
    kind, base = type(model.model), comfy.model_base.BaseModel
    if model.model.concat_keys or kind.concat_cond is not base.concat_cond:
        return True
    return isinstance(model.model.diffusion_model, UNetModel) and kind.extra_conds is not base.extra_conds


def encoded(
    prompts: str, clip: CLIP | None, positive: list[Any] | None, negative: list[Any] | None
) -> tuple[list[Any], list[Any]]:
    """Return the prompts' conditions, one entry a line, and the negative prompt's.

    Raises:
        ValueError: there is no prompt, or something must be encoded and no CLIP is connected.
    """
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if positive is None and not lines:
        raise ValueError("There is no prompt. Write prompts, one a line, or connect encoded prompts to 'positive'.")
    if clip is None and (positive is None or negative is None):
        raise ValueError(
            "No CLIP is connected, which encodes the prompts. Connect the checkpoint's CLIP to 'clip'; or connect "
            "encoded prompts to both 'positive' and 'negative'."
        )

    def encode(text: str) -> list[Any]:
        assert clip is not None
        conditioning: list[Any] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return conditioning

    if positive is None:
        positive = [entry for line in lines for entry in encode(line)]
    return positive, encode("") if negative is None else negative
