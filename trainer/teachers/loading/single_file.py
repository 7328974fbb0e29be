"""What a single .safetensors file holds, read from the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ...errors import UserError

DENOISER = "model.diffusion_model."
# Prefixes of the weights of each part in single files.
SINGLE_FILE_PARTS = {
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
COMPLETE = "set model.path to a complete checkpoint or a diffusers folder"


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


def _holds(*parts: str) -> Callable[[str], bool]:
    return lambda name: any(part in name for part in parts)


# What a file without a denoiser is, by the name of any one of its tensors, and what to do.
OTHER_KINDS: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    (
        "a LoRA",
        _holds(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".hada_w1", ".lokr_w", ".oft_"),
        f"{COMPLETE}, and model.style_lora to the LoRA to train on top of it",
    ),
    (
        "a ControlNet or T2I-adapter",
        _starts("control_model.", "controlnet_", "zero_convs.", "adapter.", "lora_controlnet"),
        f"{COMPLETE}, and model.control to this file",
    ),
    ("an IP-Adapter", _starts("image_proj.", "ip_adapter."), f"{COMPLETE}, and model.image_adapter to this file"),
    ("a Flux model", _holds("double_blocks."), "Flux has no teacher here; choose a model of another family"),
)
# The same for parts of a model, of which a file may hold several.
PARTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("a UNet in a form without its prefix", _starts("input_blocks.", "output_blocks.", "down_blocks.", "up_blocks.")),
    ("a transformer in diffusers' form", _starts("transformer_blocks.", "blocks.")),
    ("a VAE", _starts("first_stage_model.", "vae.", "decoder.", "encoder.conv_in.", "encoder.down", "quant_conv.")),
    (
        "a text encoder",
        _starts(
            *("text_model.", "encoder.block.", "transformer.resblocks."),
            *("cond_stage_model.", "conditioner.", "text_encoders."),
        ),
    ),
)


def weight_names(file: Path) -> list[str]:
    """Return the names of a single file's tensors.

    Raises:
        UserError: the file is no readable safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.path: {file} is not a readable safetensors file: {error}") from error


def check_complete_model(file: Path) -> None:
    """Check that a file holds a denoiser.

    Raises:
        UserError: it holds something else; the message says what.
    """
    names = weight_names(file)
    # The second is SD3's, also without the prefix.
    if any(name.startswith((DENOISER, "joint_blocks.")) for name in names):
        return
    for words, found, advice in OTHER_KINDS:
        if any(found(name) for name in names):
            raise UserError(f"model.path: {file} is {words}; expected a whole model: {advice}")
    parts = [words for words, found in PARTS if any(found(name) for name in names)]
    if parts:
        raise UserError(f"model.path: {file} holds {' and '.join(parts)} only; expected a whole model: {COMPLETE}")
    example = f" (its first tensor is {min(names)})" if names else " (it is empty)"
    raise UserError(
        f"model.path: {file} holds no denoiser of a known kind{example}; expected a whole model: {COMPLETE}"
    )


def absent_parts(file: Path, parts: Sequence[str]) -> list[str]:
    """Return the parts without weights in a single file."""
    names = weight_names(file)
    known = {part: prefixes for part, prefixes in SINGLE_FILE_PARTS.items() if part in parts}
    return [part for part, prefixes in known.items() if not any(name.startswith(prefixes) for name in names)]
