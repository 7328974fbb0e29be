"""LoRA adapters that are trained on a ComfyUI MODEL, by forward bypass, under the layers' diffusers names.

An adapter adds ``scale up(down(x))`` to a layer's output and leaves its weight alone. So the base may be stored in any
type, its patches stay as they are, an update far below the base's resolution is not rounded away, and removing the
hooks removes everything. ComfyUI fuses what diffusers has as separate layers (q, k and v in one): an adapter of such a
layer adds to its own slice of the output.
"""

from __future__ import annotations

import math
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

TRANSFORMER_PREFIX = "transformer."  # what ComfyUI puts before a diffusers name of a transformer's layer


@dataclass(frozen=True)
class Layer:
    """One layer by its diffusers name, and where it lies in ComfyUI's network.

    Attributes:
        path: diffusers' module path, dotted.
        module: the linear layer or convolution that holds it.
        start, length: its rows of the module's weight: all of them, or a slice of a fused one.
        rows: from an update's rows in diffusers' order to ComfyUI's; None where both are the same.
    """

    path: str
    module: nn.Module
    start: int
    length: int
    rows: Callable[[Tensor], Tensor] | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether it is a 2-d convolution rather than a linear layer."""
        return isinstance(self.module, nn.Conv2d)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a LoRA's halves, down and up."""
        if self.is_convolution:
            return (rank, self.module.in_channels, *self.module.kernel_size), (self.length, rank, 1, 1)
        return (rank, self.module.in_features), (self.length, rank)


def diffusers_layers(model: ModelPatcher) -> dict[str, Layer]:
    """The layers of a MODEL that an adapter can be put on, by diffusers' module path.

    Raises:
        ValueError: ComfyUI knows no diffusers names for this architecture.
    """
    base = model.model
    names = [key.removesuffix(".weight") for key in comfy.utils.unet_to_diffusers(base.model_config.unet_config)]
    if not names:
        keys = comfy.lora.model_lora_keys_unet(base, {})
        names = [key.removeprefix(TRANSFORMER_PREFIX) for key in keys if key.startswith(TRANSFORMER_PREFIX)]
    if not names:
        raise ValueError(
            f"ComfyUI knows no diffusers names for the layers of {type(base).__name__}, so that a LoRA trained on it "
            "would load nowhere. Use an SD 1.5, SD 2, SDXL, PixArt, SD3 or Flux model."
        )
    places = model_layers(model)
    modules = dict(base.named_modules())
    layers = {}
    for path in sorted(names):  # ComfyUI keeps them in sets: their order differs from run to run, and seeds draw in it
        target = places.get(flat_name(path))
        if target is None:  # a layer that the architecture may have and this model has not
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
        layers[path] = Layer(path, module, start, length, function)
    return layers


def _width(module: nn.Module | None) -> int | None:
    """The output width of a module that a LoRA can be put on; None for other modules (norms, embeddings)."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels if module.groups == 1 else None
    # Asked by attribute: ComfyUI's quantised linear layers are no torch.nn.Linear.
    return getattr(module, "out_features", None)


class LowRank(nn.Module):
    """``alpha / r up(down(x))`` in float32, whatever the base computes in.

    Args:
        layer: what it is put on.
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
        """The update to the layer's output, of all the rows of the module that holds it."""
        x = x.to(self.down.dtype)
        up = self.up if self.layer.rows is None else self.layer.rows(self.up)
        if self.layer.is_convolution:
            base = self.layer.module
            update = F.conv2d(F.conv2d(x, self.down, None, base.stride, base.padding, base.dilation), up)
            return update * (self.alpha / self.rank)
        update = F.linear(F.linear(x, self.down), up) * (self.alpha / self.rank)
        after = self.layer.module.out_features - self.layer.start - self.layer.length
        return F.pad(update, (self.layer.start, after)) if self.layer.start or after else update


class ModelAdapters:
    """The adapters of a MODEL's roles, and the one switch that says which of them is on.

    Args:
        model: the MODEL; its layers are hooked between :meth:`attach` and :meth:`detach`.
        device: where adapters live.
    """

    def __init__(self, model: ModelPatcher, device: torch.device) -> None:
        self.layers = diffusers_layers(model)
        self.role: Role = "teacher"
        self._device = device
        self._adapters: dict[Role, dict[str, LowRank]] = {}
        self._paths: dict[nn.Module, list[str]] = defaultdict(list)  # more than one where ComfyUI fuses layers
        for path, layer in self.layers.items():
            self._paths[layer.module].append(path)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Hook every layer that can have an adapter; without one, or in the teacher's role, nothing changes."""
        self._handles = [module.register_forward_hook(self._bypass) for module in self._paths]

    def detach(self) -> None:
        """Take all hooks off the model; the adapters can still be read."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.role = "teacher"

    def add(self, role: Role, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
        """Give a role an adapter that changes nothing yet: its up half is 0.

        Args:
            targets: what the diffusers paths of the adapted layers end in.

        Raises:
            ValueError: a target that no layer is called.
        """
        chosen = {path: layer for path, layer in self.layers.items() if _is_called(path, targets)}
        for target in targets:
            if not any(_is_called(path, [target]) for path in chosen):
                names = sorted({path.rsplit(".", 1)[-1] for path in self.layers} - {str(index) for index in range(10)})
                raise ValueError(
                    f"No layer of this model is called {target!r}; a LoRA can be put on {', '.join(names)}."
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
            ValueError: a layer that this model lacks, or has with another shape.
        """
        paths = {flat_name(path): path for path in self.layers}
        adapter = {}
        for module in modules:
            path = paths.get(flat_name(module.path))
            if path is None:
                raise ValueError(f"This LoRA does not fit this model, which has no layer {module.path}.")
            halves = (module.down, module.up)
            shapes = self.layers[path].shapes(module.rank)
            # By their numbers: a 1 x 1 convolution and a linear layer are the same thing, and files call it either.
            if any(half.numel() != math.prod(shape) for half, shape in zip(halves, shapes, strict=True)):
                raise ValueError(
                    f"This LoRA does not fit this model: its halves for the layer {module.path} are "
                    f"{tuple(module.down.shape)} and {tuple(module.up.shape)}, expected {shapes[0]} and {shapes[1]}."
                )
            down, up = (
                half.detach().float().clone().reshape(shape) for half, shape in zip(halves, shapes, strict=True)
            )
            adapter[path] = LowRank(self.layers[path], down, up, module.scale * module.rank)
        self._put(role, adapter)

    def has(self, role: Role) -> bool:
        """Whether the role has an adapter."""
        return role in self._adapters

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """The parameters of a role's adapter by name."""
        return {
            f"{path}.{half}": value
            for path, module in self._adapters.get(role, {}).items()
            for half, value in module.named_parameters()
        }

    def modules(self, role: Role) -> dict[str, LoraModule]:
        """A role's adapter as it is written to a file, by module path; copies."""
        return {
            path: LoraModule(path, module.down.detach().clone(), module.up.detach().clone(), module.alpha)
            for path, module in self._adapters.get(role, {}).items()
        }

    def _put(self, role: Role, adapter: Mapping[str, LowRank]) -> None:
        if role == "teacher":
            raise ValueError("The teacher is the model alone and has no adapter; give one to 'student' or 'critic'.")
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
