"""Hidden states of ComfyUI's networks as maps, for the discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ...flash_core.discriminator import feature_depths

# The attributes with the blocks of ComfyUI's transformers, in the order in which they run.
STACKS = ("joint_blocks", "double_blocks", "single_blocks", "blocks")


@dataclass(frozen=True)
class Tap:
    """A place in the network whose output is a hidden state.

    Attributes:
        module: the module to hook.
        tokens: maps the module's output to tokens (B, N, D), with the image's tokens last; None if the output is
            already a map.
    """

    module: nn.Module
    tokens: Callable[[Any], Tensor] | None = None

    def as_map(self, output: Any, grid: tuple[int, int]) -> Tensor:
        """Copy the hidden state to a map (B, C, H, W); some networks overwrite it in the next block.

        Args:
            output: of the module.
            grid: (H, W) in patches, for tokens.
        """
        if self.tokens is None:
            copied: Tensor = output.clone()
            return copied
        height, width = grid
        image = self.tokens(output)[:, -height * width :]
        return rearrange(image, "b (h w) d -> b d h w", h=height).clone()


def taps(network: nn.Module) -> list[Tap]:
    """Return several depths of a network, in the order in which they run; the trainer's denoisers use the same depths.

    For a UNet: all levels below the first (at full resolution, hidden states are mostly the input noise). For a
    transformer: the depths of :func:`~..flash_core.discriminator.feature_depths`.

    Raises:
        ValueError: the network's layout is unknown.
    """
    if hasattr(network, "input_blocks"):
        return [Tap(module) for module in _level_ends(network)]
    blocks = [(stack, block) for stack in STACKS for block in getattr(network, stack, ())]
    if not blocks:
        raise ValueError(
            f"The adversarial loss needs hidden states, but the layout of {type(network).__name__} is unknown; "
            f"expected a UNet or a transformer with {', '.join(STACKS)}. Turn 'adversarial' off."
        )
    return [Tap(block, _TOKENS[stack]) for stack, block in (blocks[index] for index in feature_depths(len(blocks)))]


# SD3's joint blocks return (text, image), Flux's double blocks (image, text), its single blocks text and image in one.
_TOKENS: dict[str, Callable[[Any], Tensor]] = {
    "joint_blocks": lambda output: output[1],
    "double_blocks": lambda output: output[0],
    "single_blocks": lambda output: output,
    "blocks": lambda output: output,
}


def _level_ends(unet: Any) -> Iterator[nn.Module]:
    """Yield the last modules of a UNet's levels: down from the second level, the middle, up to the second level.

    ComfyUI calls the layers of a block one by one, and never the block itself. So the last layer gets the hook.
    """
    layers = list(unet.num_res_blocks)
    index = 0  # the first block is the input convolution
    for level, count in enumerate(layers):
        index += count + (level < len(layers) - 1)  # every level but the last ends in a downsampler
        if level > 0:
            yield unet.input_blocks[index][-1]
    if unet.middle_block is not None:
        yield unet.middle_block[-1]
    index = -1
    for count in reversed(layers[1:]):
        index += count + 1  # the upsampler is in the level's last block
        yield unet.output_blocks[index][-1]


@contextmanager
def capture(network: nn.Module, places: list[Tap], z_t: Tensor) -> Iterator[list[Tensor]]:
    """Collect the hidden states at ``places`` of all calls inside the block, in the order in which they run."""
    captured: list[Tensor] = []
    patch = getattr(network, "patch_size", 1)
    grid = (math.ceil(z_t.shape[-2] / patch), math.ceil(z_t.shape[-1] / patch))

    def hook(place: Tap) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: captured.append(place.as_map(output, grid))

    handles = [place.module.register_forward_hook(hook(place)) for place in places]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
