"""Weights of a frozen network in 8 or 4 bits: each layer casts its own for the moment of its product.

The forward and the backward pass both cast, so that no cast weight is kept between them. Rounding is the only change:
a network with stored weights is another teacher, and its hash is another one. diffusers' layerwise casting does not
serve here: it casts the weights back before the backward pass, which needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from .courier import Courier
from .nf4 import from_nf4, to_nf4

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = 127
WEIGHT, SCALE = "weight", "weight_scale"


@dataclass(frozen=True)
class Scheme:
    """How weights are kept in few bits.

    Attributes:
        encode: weight (out, ...) -> bits (uint8), and factors (float32), or None.
        decode: bits, factors, the weight's shape and a dtype -> the weight in that dtype.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    decode: Callable[[Tensor, Tensor | None, Size, torch.dtype], Tensor]


def _to_float8(weight: Tensor) -> tuple[Tensor, None]:
    return weight.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), None


def _from_float8(bits: Tensor, _scale: Tensor | None, _shape: Size, dtype: torch.dtype) -> Tensor:
    return bits.view(torch.float8_e4m3fn).to(dtype)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.float()
    scale = rows.abs().amax(dim=tuple(range(1, rows.dim())), keepdim=True).clamp(min=1e-12) / INT8_MAX
    return (rows / scale).round().to(torch.int8).view(torch.uint8), scale


def _from_int8(bits: Tensor, scale: Tensor | None, _shape: Size, dtype: torch.dtype) -> Tensor:
    assert scale is not None
    return bits.view(torch.int8).to(dtype).mul_(scale)


# float8: e4m3fn without a factor, as ComfyUI's fp8_e4m3fn and diffusers' layerwise casting keep weights.
# int8: a factor for each output channel; closer to the weights than float8.
# nf4: 4 bits, a factor for each 64 values; half the bytes of int8, and farther from the weights than float8.
SCHEMES = {
    "float8": Scheme(_to_float8, _from_float8),
    "int8": Scheme(_to_int8, _from_int8),
    "nf4": Scheme(to_nf4, from_nf4),
}


# Weights as they are: for a base that waits in the computer's memory without being stored in few bits.
PLAIN = Scheme(lambda weight: (weight, None), lambda weight, _scale, _shape, dtype: weight.to(dtype))


def weight_shape(layer: nn.Linear | nn.Conv2d) -> Size:
    """Return the shape of a layer's weight, also where its bits have another one."""
    return layer.shape if isinstance(layer, Stored) and layer.scheme is not None else layer.weight.shape


def store_compactly(network: nn.Module, name: str) -> None:
    """Keep the weights of the linear layers and convolutions in a network's blocks in few bits, in place.

    The ends (embeddings, first and last layer), norms and biases keep their dtype. Call it before adapters are added,
    which stay in float32, and after everything that changes weights.

    Args:
        name: of :data:`SCHEMES`.
    """
    for layer in block_layers(network):
        if not isinstance(layer, Stored):
            store(layer, SCHEMES[name])


def block_layers(network: nn.Module) -> Iterator[Any]:
    """Yield the linear layers and convolutions in a network's blocks, stored or not; no adapters are added yet."""
    for path, module in network.named_modules():
        if (type(module) in KINDS or isinstance(module, Stored)) and "block" in path.partition(".")[0]:
            yield module


def store(layer: Any, scheme: Scheme) -> None:
    """Keep a layer's weight as ``scheme`` does, in place; the layer is still the one that adapters know."""
    layer.shape = layer.weight.shape
    bits, scale = scheme.encode(layer.weight.detach())
    if bits.dim() != layer.weight.dim():  # peft counts a weight's dimensions
        bits = bits.view(-1, *(1 for _ in layer.shape[1:]))
    layer.weight = nn.Parameter(bits, requires_grad=False)
    layer.register_parameter(SCALE, None if scale is None else nn.Parameter(scale, requires_grad=False))
    layer.scheme = scheme
    layer.__class__ = KINDS[type(layer)]


class Stored:
    """A layer that makes its weight for the moment of its product.

    peft makes a LoRA's own layers of the class of the layer that it adapts: they have no scheme, and plain weights.

    Attributes:
        scheme: how ``weight`` and ``weight_scale`` become a weight; None for a plain one.
        shape: of this weight.
        courier: brings ``weight`` and ``weight_scale`` to the device; None where they are there.
    """

    scheme: Scheme | None = None
    shape: Size
    courier: Courier | None = None
    weight_scale: nn.Parameter | None
    _parameters: dict[str, nn.Parameter | None]

    def made(self, bits: Tensor, scale: Tensor | None, dtype: torch.dtype, *, backward: bool = False) -> Tensor:
        """Return the weight on the device, in ``dtype``; ``backward`` says in which pass."""
        assert self.scheme is not None
        if self.courier is not None:
            fetched, scale = self.courier.fetch(self, backward, bits, scale)
            assert fetched is not None
            bits = fetched
        return self.scheme.decode(bits, scale, self.shape, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast the layer as torch does; a weight that waits in the computer's memory stays there."""
        if self.courier is None:
            return super()._apply(fn, recurse)  # type: ignore[misc]  # nn.Module's
        waiting = {name: self._parameters[name] for name in (WEIGHT, SCALE)}
        self._parameters.update(dict.fromkeys(waiting))
        try:
            return super()._apply(fn, recurse)  # type: ignore[misc]
        finally:
            self._parameters.update(waiting)


class CompactLinear(Stored, nn.Linear):
    """A linear layer whose weight is made when it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in the dtype of ``x``, or of autocast."""
        if self.scheme is None:
            return super().forward(x)
        x = x.to(_computed_in(x))
        out: Tensor = _Linear.apply(x, self.weight, self.weight_scale, self)  # type: ignore[no-untyped-call]
        return out


class CompactConv2d(Stored, nn.Conv2d):
    """A convolution whose weight is made when it is asked."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` (B, C, H, W) in its dtype, or of autocast."""
        if self.scheme is None:
            return super().forward(x)
        x = x.to(_computed_in(x))
        settings = (self.stride, self.padding, self.dilation, self.groups)
        out: Tensor = _Conv2d.apply(x, self.weight, self.weight_scale, self, settings)  # type: ignore[no-untyped-call]
        return out


KINDS: dict[type[nn.Module], type[Stored]] = {nn.Linear: CompactLinear, nn.Conv2d: CompactConv2d}


def _computed_in(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _bias(layer: Any, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: Tensor | None, layer: CompactLinear) -> Tensor:
        ctx.save_for_backward(bits, scale)
        ctx.layer = layer
        return F.linear(x, layer.made(bits, scale, x.dtype), _bias(layer, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ ctx.layer.made(*ctx.saved_tensors, grad.dtype, backward=True), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bits: Tensor, scale: Tensor | None, layer: CompactConv2d, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(bits, scale)
        ctx.layer, ctx.settings, ctx.shape = layer, settings, x.shape
        return F.conv2d(x, layer.made(bits, scale, x.dtype), _bias(layer, x.dtype), *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.layer.made(*ctx.saved_tensors, grad.dtype, backward=True)
        return conv2d_input(ctx.shape, weight, grad, *ctx.settings), None, None, None, None
