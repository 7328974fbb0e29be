"""Reading and writing LoRA files. Nothing is ever unpickled: a file is safetensors or it is refused."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .dialects import LoraKey, parse_key
from .metadata import FlashMetadata
from .weights import AlphaSource, LoraFile, LoraModule, flat_name

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


class LoraError(ValueError):
    """A file that can't be used as a LoRA; the message says what was found, what was expected and what to do."""


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file, or a PEFT folder, at its true scale.

    alpha is taken from the file's keys, else from its header, else from ``adapter_config.json`` beside it; else it is
    unknown, ``alpha_source`` says so, and the scale is 1.

    Raises:
        LoraError: no such file, not safetensors, no LoRA in it, DoRA, incomplete or non-finite layers.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PEFT_WEIGHTS
    if not path.is_file():
        raise LoraError(f"there is no LoRA file at {path}; give a .safetensors file or a PEFT folder")
    tensors, header = _load(path)
    grouped: dict[tuple[bool, str], dict[str, tuple[LoraKey, Tensor]]] = {}
    unknown: list[str] = []
    dialects: Counter[str] = Counter()
    for key, tensor in tensors.items():
        parsed = parse_key(key)
        if parsed is None:
            unknown.append(key)
            continue
        dialects[parsed.dialect] += 1
        group = grouped.setdefault((parsed.text_encoder, flat_name(parsed.path)), {})
        if parsed.part in group:
            raise LoraError(f"{path.name} has two tensors for {parsed.part!r} of {parsed.path}: the file is ambiguous")
        group[parsed.part] = (parsed, tensor)
    config = _adapter_config(path, header)
    modules: dict[str, LoraModule] = {}
    text_encoder: dict[str, LoraModule] = {}
    sources: Counter[AlphaSource] = Counter()
    for (is_text, name), parts in grouped.items():
        module, source = _module(path.name, parts, config)
        sources[source] += 1
        (text_encoder if is_text else modules)[name] = module
    if not modules and not text_encoder:
        example = next(iter(tensors), "nothing at all")
        raise LoraError(
            f"{path.name} holds no LoRA layers ({len(tensors)} tensors, e.g. {example!r}); "
            "expected pairs such as '<layer>.lora_down.weight' and '<layer>.lora_up.weight'"
        )
    try:
        metadata = FlashMetadata.from_header(header)
    except ValueError as error:
        raise LoraError(f"{path.name}: {error}") from error
    return LoraFile(
        modules=modules,
        text_encoder=text_encoder,
        unknown=tuple(unknown),
        dialect=dialects.most_common(1)[0][0],
        alpha_source=sources.most_common(1)[0][0],
        metadata=metadata,
        header=header,
    )


def write_lora(
    path: str | os.PathLike[str],
    modules: Mapping[str, LoraModule],
    metadata: FlashMetadata,
    *,
    transformer: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a file that stock diffusers and ComfyUI both load at its true scale.

    UNets: kohya keys (``lora_unet_<diffusers name>``) with alpha. Transformers: ``transformer.<path>.lora_A/B.weight``
    with ``alpha / r`` folded into B and no alpha key, since the readers disagree about that one. The file appears
    whole or not at all.

    Args:
        modules: by any name; each module's own dotted ``path`` is what is written.
        transformer: whether the denoiser is a transformer (SD3, PixArt, Flux) rather than a UNet.
    """
    tensors: dict[str, Tensor] = {}
    for module in modules.values():
        down, up = (tensor.detach().to("cpu", dtype).contiguous() for tensor in (module.down, module.up))
        if transformer:
            folded = (module.up.detach().to("cpu", torch.float32) * module.scale).to(dtype).contiguous()
            tensors[f"transformer.{module.path}.lora_A.weight"] = down
            tensors[f"transformer.{module.path}.lora_B.weight"] = folded
        else:
            name = f"lora_unet_{flat_name(module.path)}"
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(module.scale * module.rank, dtype=dtype)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    save_file(tensors, temporary, metadata=metadata.to_header())
    os.replace(temporary, path)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        # Asked only now: a sound safetensors file may start with the same byte, its header's length.
        if _is_pickle(path):
            raise LoraError(
                f"{path.name} is a pickle (a PyTorch .pt/.ckpt/.bin file), whatever its name says. Loading it could "
                "run code, so it is refused; ask for a .safetensors file, or convert it on a machine you trust to"
            ) from error
        raise LoraError(
            f"{path.name} is not a readable safetensors file ({error}); download it again, it may be truncated"
        ) from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    return start == b"PK" or start[:1] == b"\x80"


def _adapter_config(path: Path, header: Mapping[str, str]) -> tuple[AlphaSource, Mapping[str, Any]] | None:
    """PEFT's settings: newer diffusers writes them into the header, PEFT into a file beside the weights."""
    if "lora_adapter_metadata" in header:
        written = _json_object(header["lora_adapter_metadata"], f"the header of {path.name}")
        # diffusers prefixes each field with the component it belongs to.
        return "header", {
            name.removeprefix("unet.").removeprefix("transformer."): value for name, value in written.items()
        }
    beside = path.with_name(PEFT_CONFIG)
    if beside.is_file():
        return "adapter_config", _json_object(beside.read_text(encoding="utf-8"), str(beside.name))
    return None


def _json_object(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise LoraError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise LoraError(f"{where} should hold a JSON object, but holds {type(value).__name__}")
    return value


def _module(
    name: str,
    parts: Mapping[str, tuple[LoraKey, Tensor]],
    config: tuple[AlphaSource, Mapping[str, Any]] | None,
) -> tuple[LoraModule, AlphaSource]:
    path = next(iter(parts.values()))[0].path
    if "dora" in parts:
        raise LoraError(f"{name} is a DoRA file (layer {path} has a magnitude vector); only plain LoRA is supported")
    if "down" not in parts or "up" not in parts:
        raise LoraError(f"{name}: layer {path} has only {', '.join(sorted(parts))}; expected both halves, down and up")
    down, up = parts["down"][1], parts["up"][1]
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and down.shape[0] == up.shape[1]
    if not fits:
        raise LoraError(
            f"{name}: the halves of layer {path} do not fit: down {tuple(down.shape)}, up {tuple(up.shape)}; "
            "expected (rank, in, ...) and (out, rank, ...)"
        )
    for half in (down, up):
        if not half.is_floating_point() or not bool(torch.isfinite(half).all()):
            raise LoraError(f"{name}: layer {path} holds {half.dtype} values that are not finite numbers")
    if "alpha" in parts:
        alpha = parts["alpha"][1]
        if alpha.numel() != 1 or not math.isfinite(float(alpha)):
            raise LoraError(f"{name}: alpha of layer {path} must be one finite number")
        return LoraModule(path, down, up, float(alpha)), "file"
    if config is not None and "lora_alpha" in config[1]:
        source, settings = config
        alpha_value = float((settings.get("alpha_pattern") or {}).get(path, settings["lora_alpha"]))
        if settings.get("use_rslora"):  # rank-stabilised LoRA scales by alpha / sqrt(r)
            alpha_value *= math.sqrt(down.shape[0])
        return LoraModule(path, down, up, alpha_value), source
    return LoraModule(path, down, up, None), "unknown"
