"""LoRA adapters to train on a ComfyUI MODEL, by forward bypass, under the layers' diffusers names or ComfyUI's own.

An adapter adds ``scale up(down(x))`` to a layer's output and does not change its weight. So the base may have any data
type, its patches stay, a small update is not rounded away, and removing the hooks removes the adapter. Some layers that
are separate in diffusers are fused in ComfyUI (q, k and v): an adapter of such a layer adds to its slice of the output.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ...flash_core.denoiser import Role
from ...flash_core.lora import LoraModule, flat_name
from ..lora.patches import model_layers

TRANSFORMER_PREFIX = "transformer."  # ComfyUI's prefix of the diffusers names of a transformer's layers
NATIVE_PREFIX = "diffusion_model."  # of the names of layers in ComfyUI's network
IN_A_BLOCK = re.compile(r"\.\d+\..*")  # the path of a layer in a list of blocks


@dataclass(frozen=True)
class Layer:
    """One layer by its name, and its place in ComfyUI's network.

    Attributes:
        path: diffusers' module path, dotted; ComfyUI's own in a family without diffusers names.
        module: ComfyUI's linear layer (or a quantised one, with the same attributes) or convolution with the layer.
        start, length: the layer's rows of the module's weight: all rows, or a slice of a fused weight.
        rows: reorders an update's rows from diffusers' order to ComfyUI's; None if the orders are equal.
        alias: whether ComfyUI lists some of these rows under an earlier name too.
    """

    path: str
    module: nn.Linear | nn.Conv2d
    start: int
    length: int
    rows: Callable[[Tensor], Tensor] | None = None
    alias: bool = False

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a LoRA's halves, down and up."""
        if isinstance(self.module, nn.Conv2d):
            return (rank, self.module.in_channels, *self.module.kernel_size), (self.length, rank, 1, 1)
        return (rank, self.module.in_features), (self.length, rank)


def adaptable_layers(model: ModelPatcher) -> tuple[dict[str, Layer], bool]:
    """Return the layers of a MODEL that can get an adapter.

    Returns:
        ``(layers, native)``: by diffusers' module path where ComfyUI knows it, so that diffusers loads the LoRA too;
        else, with ``native`` True, by ComfyUI's own path, which ComfyUI's loader takes for every family.
    """
    base = model.model
    modules = dict(base.named_modules())
    names = _diffusers_names(base)
    if not names:
        named = {name: module for name, module in modules.items() if name.startswith(NATIVE_PREFIX)}
        widths = {name.removeprefix(NATIVE_PREFIX): (module, _width(module)) for name, module in named.items()}
        return {
            path: Layer(path, module, 0, width) for path, (module, width) in sorted(widths.items()) if width is not None
        }, True
    places = model_layers(model)
    layers = {}
    taken: dict[nn.Module, list[range]] = defaultdict(list)
    for path in names:
        target = places.get(flat_name(path))
        if target is None:  # a layer that only other models of the architecture have
            continue
        key, *rest = (target,) if isinstance(target, str) else target
        module = modules.get(key.removesuffix(".weight"))
        width = _width(module)
        if module is None or width is None:
            continue
        piece, function = (*rest, None, None)[:2]
        if piece is not None and piece[0] != 0:
            continue
        _, start, length = piece or (0, 0, width)
        rows = range(start, start + length)
        alias = any(max(rows.start, other.start) < min(rows.stop, other.stop) for other in taken[module])
        taken[module].append(rows)
        layers[path] = Layer(path, module, start, length, function, alias)
    return dict(sorted(layers.items())), False  # ComfyUI's sets have another order in each run; seeded draws need one


def _diffusers_names(base: Any) -> list[str]:
    """Return diffusers' paths of the layers of ComfyUI's ``BaseModel``; none for a family that it has no names for."""
    names = [key.removesuffix(".weight") for key in comfy.utils.unet_to_diffusers(base.model_config.unet_config)]
    if names:
        return names
    keys = comfy.lora.model_lora_keys_unet(base, {})
    return [key.removeprefix(TRANSFORMER_PREFIX) for key in keys if key.startswith(TRANSFORMER_PREFIX)]


def _width(module: nn.Module | None) -> int | None:
    """Return the output width of a linear layer or convolution; None for other modules (norms, embeddings)."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels if module.groups == 1 else None
    # An attribute, not a class: ComfyUI's quantised linear layers are not torch.nn.Linear.
    return getattr(module, "out_features", None)


class LowRank(nn.Module):
    """``alpha / r up(down(x))`` in float32, for a base of any data type.

    Args:
        layer: the adapted layer.
        down, up: (r, in) and (out, r), or (r, in, kh, kw) and (out, r, 1, 1).
        alpha: as in :class:`~..flash_core.lora.LoraModule`.
    """

    def __init__(self, layer: Layer, down: Tensor, up: Tensor, alpha: float) -> None:
        super().__init__()
        self.layer = layer
        self.alpha = alpha
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)

    @property
    def rank(self) -> int:
        """r."""
        return int(self.down.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the update to the output of the module that contains the layer."""
        x = x.to(self.down.dtype)
        up = self.up if self.layer.rows is None else self.layer.rows(self.up)
        base = self.layer.module
        if isinstance(base, nn.Conv2d):
            update = F.conv2d(F.conv2d(x, self.down, None, base.stride, base.padding, base.dilation), up)
            return update * (self.alpha / self.rank)
        update = F.linear(F.linear(x, self.down), up) * (self.alpha / self.rank)
        after = base.out_features - self.layer.start - self.layer.length
        return F.pad(update, (self.layer.start, after)) if self.layer.start or after else update


class ModelAdapters:
    """The adapters of a MODEL's roles. ``role`` selects the active adapter.

    Args:
        model: the MODEL; its layers have hooks between :meth:`attach` and :meth:`detach`.
        device: of the adapters.

    Attributes:
        layers: that can have an adapter.
        native: whether their names are ComfyUI's own, see :func:`adaptable_layers`.
    """

    def __init__(self, model: ModelPatcher, device: torch.device) -> None:
        self.layers, self.native = adaptable_layers(model)
        self.role: Role = "teacher"
        self._device = device
        self._adapters: dict[Role, dict[str, LowRank]] = {}
        self._paths: dict[nn.Module, list[str]] = defaultdict(list)  # more than one where ComfyUI fuses layers
        for path, layer in self.layers.items():
            self._paths[layer.module].append(path)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Hook every layer that can have an adapter; the teacher's outputs do not change."""
        self._handles = [module.register_forward_hook(self._bypass) for module in self._paths]

    def detach(self) -> None:
        """Remove all hooks from the model; the adapters stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.role = "teacher"

    def add(self, role: Role, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
        """Give a role a new adapter whose up half is 0.

        Args:
            role: ``student`` or ``critic``.
            rank, alpha: the update is scaled by ``alpha / rank``.
            targets: the endings of the adapted layers' paths; empty for every linear layer of the network's blocks.
            seed: of the down half.

        Raises:
            ValueError: no layer's path ends with a target.
        """
        chosen = {
            path: layer
            for path, layer in self.layers.items()
            if (_is_called(path, targets) if targets else _is_in_a_block(layer))
        }
        if not chosen:
            raise ValueError(
                f"This model has no layers that can get a LoRA: {len(self.layers)} were found, none in a list of "
                "blocks. Use another model."
            )
        for target in targets:
            if not any(_is_called(path, [target]) for path in chosen):
                names = sorted({path.rsplit(".", 1)[-1] for path in self.layers} - {str(index) for index in range(10)})
                raise ValueError(
                    f"This model has no layer {target!r}. Choose from the layers that can get a LoRA: "
                    f"{', '.join(names)}."
                )
        generator = torch.Generator().manual_seed(seed)
        adapter = {}
        for path, layer in chosen.items():
            down, up = layer.shapes(rank)
            bound = 1 / math.sqrt(math.prod(down[1:]))  # the usual initialisation of a linear layer
            drawn = (torch.rand(down, generator=generator) * 2 - 1) * bound
            adapter[path] = LowRank(layer, drawn, torch.zeros(up), alpha)
        self._put(role, adapter)

    def load(self, role: Role, modules: Iterable[LoraModule]) -> None:
        """Give a role the adapter of a file.

        Raises:
            ValueError: the model has no such layer, or the layer has another shape.
        """
        paths = {flat_name(path): path for path in self.layers}
        adapter = {}
        for module in modules:
            path = paths.get(flat_name(module.path))
            if path is None:
                raise ValueError(
                    f"This LoRA does not fit this model: the model has no layer {module.path}. Use a LoRA that was "
                    "made for this model."
                )
            halves = (module.down, module.up)
            shapes = self.layers[path].shapes(module.rank)
            # Compare the number of values: a 1 x 1 convolution and a linear layer are equal, and files use both.
            if any(half.numel() != math.prod(shape) for half, shape in zip(halves, shapes, strict=True)):
                raise ValueError(
                    f"This LoRA does not fit this model: its halves for the layer {module.path} are "
                    f"{tuple(module.down.shape)} and {tuple(module.up.shape)}, expected {shapes[0]} and {shapes[1]}. "
                    "Use a LoRA that was made for this model."
                )
            down, up = (
                half.detach().float().clone().reshape(shape) for half, shape in zip(halves, shapes, strict=True)
            )
            adapter[path] = LowRank(self.layers[path], down, up, module.scale * module.rank)
        self._put(role, adapter)

    def has(self, role: Role) -> bool:
        """Return whether the role has an adapter."""
        return role in self._adapters

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The parameters of a role's adapter by name."""
        return {
            f"{path}.{half}": value
            for path, module in self._adapters.get(role, {}).items()
            for half, value in module.named_parameters()
        }

    def modules(self, role: Role) -> dict[str, LoraModule]:
        """Copy a role's adapter for a file, by module path."""
        return {
            path: LoraModule(path, module.down.detach().clone(), module.up.detach().clone(), module.alpha)
            for path, module in self._adapters.get(role, {}).items()
        }

    def _put(self, role: Role, adapter: Mapping[str, LowRank]) -> None:
        if role == "teacher":
            raise ValueError("The teacher is the model without an adapter. Give the adapter to 'student' or 'critic'.")
        self._adapters[role] = {path: module.to(self._device) for path, module in adapter.items()}

    def _bypass(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        adapter = self._adapters.get(self.role)
        if adapter is None:
            return output
        for path in self._paths[module]:
            if path in adapter:
                output = output + adapter[path](inputs[0]).to(output.dtype)
        return output


def _is_called(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _is_in_a_block(layer: Layer) -> bool:
    return IN_A_BLOCK.search(layer.path) is not None and not layer.alias and not isinstance(layer.module, nn.Conv2d)
