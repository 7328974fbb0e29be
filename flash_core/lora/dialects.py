"""The spellings of LoRA keys in the tools of the field.

A key is ``<prefix><module path><suffix>``. The prefix tells the dialect and whether the layer is the denoiser's or a
text encoder's; the suffix tells which tensor of the layer it is, or that the file holds another algorithm than LoRA.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, TypeAlias

Part: TypeAlias = Literal["down", "up", "mid", "alpha", "weight", "bias", "foreign"]

# The first match wins, so what begins with another prefix stands before it.
_PREFIXES: tuple[tuple[str, str, bool], ...] = (
    ("unet.base_model.model.", "peft", False),
    ("transformer.base_model.model.", "peft", False),
    ("base_model.model.text_encoder", "peft", True),
    ("base_model.model.text_model.", "peft", True),  # an adapter of CLIP alone
    ("base_model.model.", "peft", False),
    ("text_encoder_3.", "diffusers", True),
    ("text_encoder_2.", "diffusers", True),
    ("text_encoder.", "diffusers", True),
    ("text_encoders.", "native", True),
    ("text_model.", "bare", True),
    ("model.diffusion_model.", "native", False),
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
# Textual-inversion embeddings that some trainers pack into the LoRA's file.
EMBEDDING = re.compile(r"^(bundle_emb|emb_params|embeddings?)\b")

_SUFFIX = re.compile(
    r"""(?:
    (?P<down>\.lora_down\.weight | \.lora_A (?:\.[\w-]+)? \.weight | \.lora_A | \.lora(?:_linear_layer)?\.down\.weight)
    | (?P<up>\.lora_up\.weight | \.lora_B (?:\.[\w-]+)? \.weight | \.lora_B | \.lora(?:_linear_layer)?\.up\.weight)
    | (?P<mid>\.lora_mid\.weight)
    | (?P<alpha>(?:\.lora)?\.alpha)
    | (?P<weight>\.diff | \.w_norm)
    | (?P<bias>\.diff_b | \.b_norm)
    )$""",  # PEFT may put the adapter's name before ".weight"
    re.VERBOSE,
)

_PARTS: dict[str, Part] = {
    **{"down": "down", "up": "up", "mid": "mid", "alpha": "alpha"},
    **{"weight": "weight", "bias": "bias"},  # the change of a whole weight or bias
}

# Tensors by which other algorithms are known (LyCORIS' and PEFT's names).
_ALGORITHMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector(\.[\w-]+)?(\.weight)?)$"), "DoRA"),
    (re.compile(r"\.hada_(w[12]_[ab]|t[12])(\.[\w-]+)?$"), "LoHa"),
    (re.compile(r"\.lokr_(w[12](_[ab])?|t[12])(\.[\w-]+)?$"), "LoKr"),
    (re.compile(r"\.(boft_[RsP]|boft_blocks)(\.[\w-]+)*$"), "BOFT"),
    (re.compile(r"\.(oft_blocks|oft_diag|oft_[rRs])(\.[\w-]+)*$"), "OFT"),
    (re.compile(r"\.([ab][12])\.weight$"), "GLoRA"),
    (re.compile(r"\.(on_input|ia3_l(\.[\w-]+)?)$"), "IA3"),
    (re.compile(r"\.vera_lambda_[bd](\.[\w-]+)?$"), "VeRA"),
    (re.compile(r"\.lora_E(\.[\w-]+)?$"), "AdaLoRA"),
)

# diffusers before 0.20 hung the layers on attention processors.
_PROCESSOR = re.compile(r"^(?P<path>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight$")

# What a module can be called: no key becomes a path of anything else.
_PATH = re.compile(r"(?=.{1,256}$)[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")


class LoraKey(NamedTuple):
    """One parsed key of a LoRA file.

    Attributes:
        dialect: the tool that spells keys this way.
        path: the layer; a text encoder's keeps its prefix, which tells several encoders apart.
        part: the tensor of the layer: down, up, alpha ...; ``weight`` and ``bias`` are changes of the whole tensor.
        text_encoder: whether the layer is a text encoder's.
        algorithm: the algorithm's name where ``part`` is ``foreign``: not plain LoRA.
    """

    dialect: str
    path: str
    part: Part
    text_encoder: bool
    algorithm: str = "LoRA"


def parse_key(key: str) -> LoraKey | None:
    """Parse a key of a LoRA file; return None for a key of no known dialect."""
    dialect, path, text_encoder = "bare", key, False
    for prefix, name, is_text in _PREFIXES:
        if key.startswith(prefix):
            dialect, path, text_encoder = name, key if is_text else key[len(prefix) :], is_text
            break
    part: Part
    processor = _PROCESSOR.match(path) if ".processor." in path else None
    if processor:
        layer = "to_out.0" if processor["layer"] == "to_out" else processor["layer"]
        dialect, path = "diffusers-processor", f"{processor['path']}.{layer}"
        part = "down" if processor["part"] == "down" else "up"
        return LoraKey(dialect, path, part, text_encoder) if _PATH.match(path) else None
    suffix = _SUFFIX.search(path)
    if suffix:
        path, part = path[: suffix.start()], _PARTS[str(suffix.lastgroup)]
        return LoraKey(dialect, path, part, text_encoder) if _PATH.match(path) else None
    for pattern, algorithm in _ALGORITHMS:
        found = pattern.search(path)
        if found:
            return LoraKey(dialect, path[: found.start()], "foreign", text_encoder, algorithm)
    return None
