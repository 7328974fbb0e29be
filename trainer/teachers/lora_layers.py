"""LoRA files meet a network's layers: which layer each update belongs to, and updates that are merged for good."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...flash_core.lora import LoraModule, flat_name, read_lora, with_diffusers_names
from ...flash_core.lora.names import text_encoder_path
from ..config import StyleLora
from ..errors import UserError
from .in_memory.compact import weight_shape

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from ...flash_core.lora import FlashMetadata

logger = logging.getLogger(__name__)


def fit_lora(network: nn.Module, modules: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """Return a LoRA's modules by the paths of a network's layers, with halves in the layers' shapes.

    Args:
        modules: as :class:`~...flash_core.lora.LoraFile` holds them, in any tool's names.

    Raises:
        UserError: the network lacks a layer, or has another size of the layer.
    """
    layers = {
        flat_name(path.removesuffix(".base_layer")): (path.removesuffix(".base_layer"), module)
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and ".lora_" not in path
    }
    try:
        named = with_diffusers_names(modules)
    except ValueError as error:
        raise UserError(f"this LoRA does not fit the model: {error}") from error
    wanted = {flat_name(path): module for path, module in named.items()}
    missing = sorted(set(wanted) - set(layers))
    if missing or not wanted:
        example = f", such as {missing[0]}" if missing else ""
        raise UserError(
            f"this LoRA does not fit the model: {len(missing)} of {len(wanted)} layers do not exist there{example}. "
            "Choose a LoRA made for this model"
        )
    fitted = {}
    for name, module in wanted.items():
        path, layer = layers[name]
        shape = weight_shape(layer)
        down = (module.rank, *shape[1:])
        up = (shape[0], module.rank, *(1 for _ in shape[2:]))
        # A 1 x 1 convolution and a linear layer have the same weights, and files store either.
        if (module.down.numel(), module.up.numel()) != (math.prod(down), math.prod(up)):
            raise UserError(
                f"this LoRA does not fit the model: layer {path} is {tuple(shape)}, the LoRA's is "
                f"{module.shape}. Choose a LoRA made for this model"
            )
        fitted[path] = replace(module, path=path, down=module.down.reshape(down), up=module.up.reshape(up))
    return fitted


@torch.no_grad()
def merge_lora(network: nn.Module, modules: Mapping[str, LoraModule], strength: float) -> None:
    """Add ``strength`` times a LoRA's updates to a network's weights.

    Raises:
        UserError: the LoRA does not fit the network.
    """
    for path, module in fit_lora(network, modules).items():
        weight = network.get_parameter(f"{path}.weight")
        here = replace(module, down=module.down.to(weight.device), up=module.up.to(weight.device))
        weight.copy_(weight.float() + strength * here.update().view_as(weight))


@torch.no_grad()
def start_adapter(adapter: Mapping[str, LoraModule], network: nn.Module, path: Path) -> FlashMetadata | None:
    """Give an adapter that is about to train the update of a LoRA file, and return what the file says of itself.

    Layers that the file lacks stay as they are. Where the adapter's rank is higher than the file's, the rest of its up
    half is 0, so that the update is exactly the file's.

    Args:
        adapter: the adapter's layers by module path; the halves are its parameters.
        network: the network of the adapter.

    Raises:
        UserError: the file does not fit; the message names it.
        LoraError: the file can't be read.
    """
    file = read_lora(path)
    if more := [*file.unknown, *file.text_encoder]:
        raise UserError(
            f"lora.start: {path}: {len(more)} of its keys are not LoRA on a layer of the network, such as {more[0]}, "
            "and would be lost. Choose a LoRA that this trainer made"
        )
    try:
        fitted = fit_lora(network, file.modules)
    except UserError as error:
        raise UserError(f"lora.start: {path}: {error}") from error
    if more := sorted(set(fitted) - set(adapter)):
        raise UserError(
            f"lora.start: {path} has {len(more)} layers that this recipe does not train, such as {more[0]}; add them "
            "to lora.targets"
        )
    highest = max(fitted.values(), key=lambda module: module.rank)
    if highest.rank > (own := adapter[highest.path].rank):
        raise UserError(
            f"lora.start: {path} has rank {highest.rank}, more than the recipe's {own}; set lora.rank to "
            f"{highest.rank} or more"
        )
    for name, given in fitted.items():
        target = adapter[name]
        target.down[: given.rank] = given.down.to(target.down)
        target.up.zero_()
        target.up[:, : given.rank] = given.up.to(target.up) * (given.scale / target.scale)
    return file.metadata


def merge_style(pipeline: DiffusionPipeline, network_part: str, style: StyleLora) -> None:
    """Merge a style LoRA into a pipeline's network and text encoders.

    Raises:
        UserError: the LoRA does not fit the model, or holds more than plain LoRA; the message names the file.
        LoraError: the file can't be read.
    """
    file = read_lora(style.path)
    if file.unknown:
        raise UserError(
            f"model.style_lora: {style.path}: {len(file.unknown)} of its keys are not plain LoRA on a layer, such as "
            f"{file.unknown[0]}, and would be lost. Choose a plain LoRA of this style"
        )
    by_part: dict[str, dict[str, LoraModule]] = {network_part: dict(file.modules)} if file.modules else {}
    for name, module in file.text_encoder.items():
        place = text_encoder_path(module.path)
        number, path = place if place is not None else (1, module.path)
        part = "text_encoder" if number == 1 else f"text_encoder_{number}"
        by_part.setdefault(part, {})[name] = replace(module, path=path)
    for part, modules in by_part.items():
        network = getattr(pipeline, part, None)
        try:
            if network is None:
                raise UserError(f"this LoRA does not fit the model, which has no {part}")
            merge_lora(network, {flat_name(module.path): module for module in modules.values()}, style.strength)
        except UserError as error:
            raise UserError(f"model.style_lora: {style.path}, {part}: {error}") from error
    logger.info("merged %s at strength %g into %s", style.path.name, style.strength, ", ".join(by_part))
