"""Writing LoRA files: the portable forms, which diffusers and ComfyUI load at the true scale, and single dialects."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from .container import LoraError
from .metadata import FlashMetadata
from .names import kohya_text_name, text_encoder_path
from .settings import PEFT_CONFIG, PEFT_WEIGHTS
from .weights import LoraModule, computable, flat_name

Dialect: TypeAlias = Literal["portable", "kohya", "diffusers", "peft"]
Name = TypeVar("Name")
DIALECTS: tuple[Dialect, ...] = ("portable", "kohya", "diffusers", "peft")


def write_lora(
    path: str | os.PathLike[str],
    modules: Mapping[str, LoraModule],
    metadata: FlashMetadata | None,
    *,
    transformer: bool = False,
    dtype: torch.dtype | None = torch.float32,
    dialect: Dialect = "portable",
    text_encoder: Mapping[str, LoraModule] | None = None,
    header: Mapping[str, str] | None = None,
    component: str | None = None,
) -> None:
    """Write a LoRA file or folder, completely or not at all.

    Stock diffusers and ComfyUI both load ``portable`` at its true scale. UNets: kohya keys
    (``lora_unet_<diffusers name>``) with alpha. Transformers: ``transformer.<path>.lora_A/B.weight`` with ``alpha / r``
    folded into B and no alpha key, since readers disagree about alpha keys. ``diffusers`` writes the latter form for
    UNets too; ``peft`` a folder for ``PeftModel.from_pretrained`` on the network. Layers of several ranks or scales are
    brought to one rank and scale in ``portable`` and ``diffusers`` (see :func:`uniform`).

    Args:
        path: the file; for ``peft`` the folder.
        modules: by any name; each module's own dotted ``path`` in diffusers' network is what is written.
        transformer: True for a transformer (SD3, PixArt, Flux), False for a UNet.
        dtype: type of the stored halves. Default: each half's own type.
        text_encoder: text encoders' layers, in kohya's or diffusers' names.
        header: more strings for the file's header.
        component: what ``portable`` and ``diffusers`` call the network: ``diffusion_model`` for paths that are
            ComfyUI's own. Default: ``transformer`` or ``unet``, diffusers' names.

    Raises:
        LoraError: the dialect can't hold these layers.
    """
    strings = {**(header or {}), **(metadata.to_header() if metadata is not None else {})}
    text = _text_paths(text_encoder or {})
    kohya = dialect == "kohya" or (dialect == "portable" and not transformer and component is None)
    if dialect == "kohya" and transformer:
        raise LoraError(
            "kohya's form names fused layers of transformers, which diffusers does not have; write the portable form "
            "(--to portable)"
        )
    if dialect == "peft" and text:
        raise LoraError(
            f"a PEFT folder holds one network, but {len(text)} layers belong to a text encoder. Drop these layers "
            "(--no-text-encoder), or write the portable form (--to portable)"
        )
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    if dialect in ("portable", "diffusers"):
        modules, text = uniform(modules), uniform(text)
    if kohya:
        several = any(number > 1 for number, _ in text)
        names = {f"lora_unet_{flat_name(module.path)}": module for module in modules.values()}
        names |= {kohya_text_name(number, inner, several): module for (number, inner), module in text.items()}
        for name, module in names.items():
            tensors[f"{name}.lora_down.weight"] = _stored(module.down, dtype)
            tensors[f"{name}.lora_up.weight"] = _stored(module.up, dtype)
            tensors[f"{name}.alpha"] = torch.tensor(module.scale * module.rank, dtype=torch.float32)
        save_whole(tensors, path, strings)
    elif dialect == "peft":
        for module in modules.values():
            tensors[f"base_model.model.{module.path}.lora_A.weight"] = _stored(module.down, dtype)
            tensors[f"base_model.model.{module.path}.lora_B.weight"] = _stored(module.up, dtype)
        _save_folder(tensors, path, strings, _peft_config(modules))
    else:
        component = component or ("transformer" if transformer else "unet")
        names = {f"{component}.{module.path}": module for module in modules.values()}
        for (number, inner), module in text.items():
            names[f"text_encoder{f'_{number}' if number > 1 else ''}.{inner}"] = module
        for name, module in names.items():
            tensors[f"{name}.lora_A.weight"] = _stored(module.down, dtype)
            if module.scale == 1:
                tensors[f"{name}.lora_B.weight"] = _stored(module.up, dtype)
            else:
                folded = module.up.detach().float() * module.scale
                tensors[f"{name}.lora_B.weight"] = _stored(folded, dtype or computable(module.up.dtype))
        save_whole(tensors, path, strings)


def uniform(modules: Mapping[Name, LoraModule]) -> dict[Name, LoraModule]:
    """Return the same updates at one rank and one scale.

    diffusers (0.39) confuses ranks and alphas if a file's layers differ, and scales these layers wrongly. Smaller ranks
    are padded with zeros, which change nothing; differing scales are folded into the up half.
    """
    ranks = {module.rank for module in modules.values()}
    scales = {module.scale for module in modules.values()}
    if len(ranks) <= 1 and len(scales) <= 1:
        return dict(modules)
    rank = max(ranks)
    found = {}
    for name, module in modules.items():
        up = module.up
        if len(scales) > 1 and module.scale != 1:
            up = (up.detach().float() * module.scale).to(computable(up.dtype))
        alpha = float(rank) if len(scales) > 1 else module.scale * rank
        missing = rank - module.rank
        down = (
            torch.cat([module.down, module.down.new_zeros(missing, *module.down.shape[1:])]) if missing else module.down
        )
        up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1) if missing else up
        found[name] = replace(module, down=down, up=up, alpha=alpha)
    return found


def _stored(half: Tensor, dtype: torch.dtype | None) -> Tensor:
    return half.detach().to("cpu", dtype or half.dtype).contiguous()


def _text_paths(modules: Mapping[str, LoraModule]) -> dict[tuple[int, str], LoraModule]:
    paths = {}
    for module in modules.values():
        place = text_encoder_path(module.path)
        if place is None:
            raise LoraError(
                f"text encoder layer {module.path} has an unknown name; drop the text encoders' layers "
                "(--no-text-encoder)"
            )
        paths[place] = module
    return paths


def _peft_config(modules: Mapping[str, LoraModule]) -> dict[str, object]:
    """Return ``adapter_config.json``: the commonest rank and alpha, and the layers that differ, by name."""
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    alphas = {module.path: module.scale * module.rank for module in modules.values()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(module.path for module in modules.values()),
        "rank_pattern": {module.path: module.rank for module in modules.values() if module.rank != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
    }


def save_whole(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file, completely or not at all; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        _save_tensors(tensors, temporary, header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Save tensors; parts of a split fused layer share their down half, but the file holds one copy for each."""
    places: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        own[key] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    path.unlink(missing_ok=True)  # of a run that was killed
    path.touch()
    permissions = path.stat().st_mode  # of any new file; safetensors would make the file private
    save_file(own, path, metadata=header or None)
    path.chmod(permissions)


def _save_folder(tensors: dict[str, Tensor], path: Path, header: dict[str, str], config: Mapping[str, object]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _save_tensors(tensors, temporary / PEFT_WEIGHTS, header)
        (temporary / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if path.is_dir():
            # Replace only the two files of a PEFT folder, since the folder may hold other files of the user.
            for name in (PEFT_WEIGHTS, PEFT_CONFIG):
                os.replace(temporary / name, path / name)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
