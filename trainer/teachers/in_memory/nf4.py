"""NF4: 4 bits a weight, the quantiles of a normal distribution, in blocks of 64 (QLoRA, arXiv 2305.14314).

The bits and factors are those of bitsandbytes' ``quantize_4bit`` without nested factors (a test compares them). torch
alone makes and reads them, so that the library is not needed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Size, Tensor

BLOCK = 64  # values that share a factor (QLoRA, section 4)
# QLoRA, appendix E: quantiles of N(0, 1), scaled to [-1, 1], with an exact 0.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bits of a weight, two values in a byte (uint8, (N / 2,)), and the factor of each block (N / 64, 1).

    N is the number of its values, filled up with zeros to a multiple of 64. The first of two values has the high bits.
    """
    values = weight.float().flatten()
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS, device=weight.device)
    nearest = torch.bucketize(blocks / scale.clamp(min=1e-12), (levels[1:] + levels[:-1]) / 2)
    pairs = nearest.to(torch.uint8).view(-1, 2)
    return pairs[:, 0] * 16 + pairs[:, 1], scale


def from_nf4(bits: Tensor, scale: Tensor | None, shape: Size, dtype: torch.dtype) -> Tensor:
    """Return the weight of bits (N / 2 in any shape) and factors."""
    assert scale is not None
    pairs = F.embedding(bits.flatten().int(), _pairs(bits.device, dtype))
    values = pairs.view(-1, BLOCK).mul_(scale).view(-1)
    return values[: shape.numel()].view(shape)


@lru_cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the two values of each byte (256, 2); kept, since copying them to a GPU anew would wait for it."""
    with torch.inference_mode(False):
        levels = torch.tensor(LEVELS, dtype=dtype)
        return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).to(device)
