"""Scaled 8-bit weights: a file stores weight / scale, and the scale beside it; true weights are their product.

Two layouts are in public use. ``layer.scale_weight``, with an empty ``scaled_fp8`` as a mark, is the older; and
``layer.weight_scale`` with ``layer.comfy_quant`` (JSON as bytes) or ``_quantization_metadata`` in the header the newer.
Scales of inputs speed up matrix products and are no part of the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import UserError

WEIGHT_SCALES = ("scale_weight", "weight_scale")
MARKS = ("scaled_fp8", "comfy_quant", "scale_input", "input_scale")
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
SCALE = re.compile(r"scale|absmax|quant_(map|state)|zero_?point")
HEADER = "_quantization_metadata"


def is_scaled(file: Path) -> bool:
    """Return True if a file holds weights that mean nothing without their scales.

    Raises:
        UserError: the file is quantised in a way that can't be undone here; the message names the way.
    """
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        marks = {name: opened.get_tensor(name) for name in names if _is_json(name)}
        try:
            formats = _formats(opened.metadata() or {}, marks)
        except (ValueError, AttributeError, TypeError) as error:
            raise _refused(file, f"its format can't be read: {error}") from error
        unknown = sorted(set(formats.values()) - set(FORMATS))
        if unknown:
            raise _refused(file, ", ".join(unknown))
        for name in sorted(names):
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and opened.get_slice(name).get_dtype() in INTEGERS and layer not in formats:
                raise _refused(file, f"{name} holds whole numbers")
            if SCALE.search(kind) and kind not in (*WEIGHT_SCALES, *MARKS) and _is_quantised(opened, names, layer):
                raise _refused(file, f"it has {name}")
        return any(name.rpartition(".")[2] in WEIGHT_SCALES for name in names)


def true_weights(file: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a scaled file by name: scaled weights times their scales, and the rest unchanged.

    Args:
        dtype: of the products, which are computed in float32.

    Raises:
        UserError: a scale does not fit its weight.
    """
    with safe_open(file, framework="pt") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        formats = _formats(opened.metadata() or {}, stored)
    scales = {
        name.rpartition(".")[0]: value for name, value in stored.items() if name.rpartition(".")[2] in WEIGHT_SCALES
    }
    tensors = {}
    for name, value in stored.items():
        layer, _, kind = name.rpartition(".")
        if kind in (*WEIGHT_SCALES, *MARKS):
            continue
        if kind == "weight" and layer in scales:
            if layer in formats and value.dtype == torch.uint8:  # older tools store the bytes as whole numbers
                value = value.view(FORMATS[formats[layer]])
            value = _product(value, scales[layer], f"{file}, {name}").to(dtype)
        tensors[name] = value
    return tensors


def _product(weight: Tensor, scale: Tensor, where: str) -> Tensor:
    """Return weight times a scale of the whole tensor, or of each of its rows."""
    if scale.numel() not in (1, len(weight)):
        raise UserError(
            f"model.path: {where} has a scale of shape {tuple(scale.shape)}; expected one number, or one for each of "
            f"the {len(weight)} rows. Choose the model's bfloat16 or float16 file"
        )
    rows = scale.float().reshape(-1, *(1 for _ in weight.shape[1:]))
    return weight.float() * rows


def _formats(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return layer -> the name of its format, from the header and the layers' marks."""
    found: dict[str, str] = {}
    layers: Any = json.loads(header[HEADER]).get("layers", {}) if HEADER in header else {}
    for name, value in tensors.items():
        if _is_json(name):
            layers[name.rpartition(".")[0]] = json.loads(bytes(value.flatten().tolist()))
    for layer, fact in layers.items():
        found[layer] = str(fact.get("format") if isinstance(fact, dict) else fact)
    return found


def _is_json(name: str) -> bool:
    return name.endswith(".comfy_quant")


def _is_quantised(opened: Any, names: set[str], layer: str) -> bool:
    """Return True if the layer that a scale is for is stored in 8 bits: other layers may be called scale."""
    weight = next((name for name in (f"{layer}.weight", layer) if name in names), None)
    return weight is not None and opened.get_slice(weight).get_dtype() in (*FLOAT8, *INTEGERS)


def _refused(file: Path, what: str) -> UserError:
    return UserError(
        f"model.path: {file} is quantised in a way that is not supported ({what}); float8 with a scale for each layer "
        "or row can be read. Choose the model's bfloat16, float16 or scaled float8 file"
    )
