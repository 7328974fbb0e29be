"""Weights of a frozen network in 8 or 4 bits: each layer casts its own for the moment of its product.

The forward and the backward pass both cast, so that no cast weight is kept between them. Rounding is the only change:
a network with stored weights is another teacher, and its hash is another one. diffusers' layerwise casting does not
serve here: it casts the weights back before the backward pass, which needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from .nf4 import from_nf4, to_nf4

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
INT8_MAX = 127


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


def weight_shape(layer: nn.Linear | nn.Conv2d) -> Size:
    """Return the shape of a layer's weight, also where its bits have another one."""
    if isinstance(layer, (CompactLinear, CompactConv2d)) and layer.scheme is not None:
        return layer.shape
    return layer.weight.shape


def store_compactly(network: nn.Module, name: str) -> None:
    """Keep the weights of the linear layers and convolutions in a network's blocks in few bits, in place.

    The ends (embeddings, first and last layer), norms and biases keep their dtype. Call it before adapters are added,
    which stay in float32, and after everything that changes weights.

    Args:
        name: of :data:`SCHEMES`.
    """
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: CompactLinear, nn.Conv2d: CompactConv2d}
    for path, module in network.named_modules():
        kind = kinds.get(type(module))
        if kind is None or "block" not in path.partition(".")[0]:
            continue
        layer: Any = module
        layer.shape = layer.weight.shape
        bits, scale = SCHEMES[name].encode(layer.weight.detach())
        if bits.dim() != layer.weight.dim():  # peft counts a weight's dimensions
            bits = bits.view(-1, *(1 for _ in layer.shape[1:]))
        layer.weight = nn.Parameter(bits, requires_grad=False)
        layer.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        layer.scheme = SCHEMES[name]
        layer.__class__ = kind  # still the layer that adapters know, with its sizes and its name


class CompactLinear(nn.Linear):
    """A linear layer whose weight is kept in few bits.

    peft makes a LoRA's own layers of the class of the layer that it adapts. They have no scheme, and plain weights.
    """

    scheme: Scheme | None = None
    shape: Size
    weight_scale: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in the dtype of ``x``, or of autocast."""
        if self.scheme is None:
            return super().forward(x)
        x = x.to(_computed_in(x))
        out: Tensor = _Linear.apply(x, self.weight, self.weight_scale, self.scheme, self.shape)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)


class CompactConv2d(nn.Conv2d):
    """A convolution whose weight is kept in few bits.

    peft makes a LoRA's own layers of the class of the layer that it adapts. They have no scheme, and plain weights.
    """

    scheme: Scheme | None = None
    shape: Size
    weight_scale: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of ``x`` (B, C, H, W) in its dtype, or of autocast."""
        if self.scheme is None:
            return super().forward(x)
        x = x.to(_computed_in(x))
        settings = (self.stride, self.padding, self.dilation, self.groups)
        stored = (self.weight, self.weight_scale, self.scheme, self.shape)
        out: Tensor = _Conv2d.apply(x, *stored, settings)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]


def _computed_in(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: Tensor | None, scheme: Scheme, shape: Size) -> Tensor:
        ctx.save_for_backward(bits, scale)
        ctx.scheme, ctx.weight = scheme, shape
        return F.linear(x, scheme.decode(bits, scale, shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.scheme.decode(*ctx.saved_tensors, ctx.weight, grad.dtype)
        return grad @ weight, None, None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bits: Tensor, scale: Tensor | None, scheme: Scheme, shape: Size, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(bits, scale)
        ctx.scheme, ctx.settings, ctx.weight, ctx.shape = scheme, settings, shape, x.shape
        return F.conv2d(x, scheme.decode(bits, scale, shape, x.dtype), None, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.scheme.decode(*ctx.saved_tensors, ctx.weight, grad.dtype)
        given = conv2d_input(ctx.shape, weight, grad, *ctx.settings)
        return given, None, None, None, None, None
