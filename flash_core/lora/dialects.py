"""How the tools of the field spell LoRA keys.

A key is ``<prefix><module path><suffix>``. The prefix tells the dialect and whether the layer is the denoiser's or a
text encoder's; the suffix tells which tensor of the layer it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

Part: TypeAlias = Literal["down", "up", "alpha", "dora"]

# Longest first: the first match wins.
_PREFIXES: tuple[tuple[str, str, bool], ...] = (
    ("unet.base_model.model.", "peft", False),
    ("transformer.base_model.model.", "peft", False),
    ("base_model.model.text_encoder.", "peft", True),
    ("base_model.model.", "peft", False),
    ("text_encoder_3.", "diffusers", True),
    ("text_encoder_2.", "diffusers", True),
    ("text_encoder.", "diffusers", True),
    ("diffusion_model.", "native", False),
    ("lora_transformer_", "lora_transformer", False),
    ("transformer.", "diffusers", False),
    ("unet.", "diffusers", False),
    ("lora_unet_", "kohya", False),
    ("lora_te1_", "kohya", True),
    ("lora_te2_", "kohya", True),
    ("lora_te3_", "kohya", True),
    ("lora_te_", "kohya", True),
    ("lycoris_", "lycoris", False),
)

_SUFFIXES: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(r"\.lora_down\.weight$"), "down"),
    (re.compile(r"\.lora_up\.weight$"), "up"),
    (re.compile(r"\.lora_A(\.default)?\.weight$"), "down"),
    (re.compile(r"\.lora_B(\.default)?\.weight$"), "up"),
    (re.compile(r"\.lora\.down\.weight$"), "down"),
    (re.compile(r"\.lora\.up\.weight$"), "up"),
    (re.compile(r"(\.lora)?\.alpha$"), "alpha"),
    (re.compile(r"\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)$"), "dora"),
)

# diffusers before 0.20 hung the layers on attention processors.
_PROCESSOR = re.compile(r"^(?P<path>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight$")


@dataclass(frozen=True)
class LoraKey:
    """One key, understood."""

    dialect: str
    path: str
    part: Part
    text_encoder: bool


def parse_key(key: str) -> LoraKey | None:
    """What a key of a LoRA file means, or None where it belongs to no dialect we know."""
    dialect, path, text_encoder = "bare", key, False
    for prefix, name, is_text in _PREFIXES:
        if key.startswith(prefix):
            # Text encoders' layers keep the prefix: it is what tells several encoders apart.
            dialect, path, text_encoder = name, key if is_text else key[len(prefix) :], is_text
            break
    processor = _PROCESSOR.match(path)
    if processor:
        layer = "to_out.0" if processor["layer"] == "to_out" else processor["layer"]
        part: Part = "down" if processor["part"] == "down" else "up"
        return LoraKey("diffusers-processor", f"{processor['path']}.{layer}", part, text_encoder)
    for pattern, part in _SUFFIXES:
        found = pattern.search(path)
        if found:
            return LoraKey(dialect, path[: found.start()], part, text_encoder)
    return None
