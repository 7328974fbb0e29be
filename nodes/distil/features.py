"""Hidden states of ComfyUI's networks as maps, for the discriminator: where they are and how they come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ...flash_core.discriminator import feature_depths

# Where ComfyUI's transformers keep their blocks, in the order they run.
STACKS = ("joint_blocks", "double_blocks", "single_blocks", "blocks")


@dataclass(frozen=True)
class Tap:
    """A place in the network whose output is a hidden state.

    Attributes:
        module: what to hook.
        tokens: from the module's output to the tokens (B, N, D) of which the last ones are the image's; None where the
            output is a map already.
    """

    module: nn.Module
    tokens: Callable[[Any], Tensor] | None = None

    def as_map(self, output: Any, grid: tuple[int, int]) -> Tensor:
        """The hidden state (B, C, H, W), copied: some networks write the next block's output over it.

        Args:
            grid: (H, W) in patches, for tokens.
        """
        if self.tokens is None:
            return output.clone()
        height, width = grid
        image = self.tokens(output)[:, -height * width :]
        return rearrange(image, "b (h w) d -> b d h w", h=height).clone()


def taps(network: nn.Module) -> list[Tap]:
    """Several depths of a network, in the order they run: those that the trainer's denoisers read too.

    A UNet gives all levels below the first, since at full resolution hidden states are mostly the noise that came in; a
    transformer those of :func:`~..flash_core.discriminator.feature_depths`.

    Raises:
        ValueError: a network of an unknown layout.
    """
    if hasattr(network, "input_blocks"):
        return [Tap(module) for module in _level_ends(network)]
    blocks = [(stack, block) for stack in STACKS for block in getattr(network, stack, ())]
    if not blocks:
        raise ValueError(
            f"The adversarial loss reads hidden states, and {type(network).__name__} keeps its blocks where none are "
            f"known; expected a UNet or a transformer with {', '.join(STACKS)}. Set the adversarial weight to 0."
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
    """The modules that a UNet's levels end in: down from the second level, the middle, up to the second level.

    ComfyUI calls the layers of a block one by one and never the block itself, so the last layer is what can be hooked.
    """
    layers = list(unet.num_res_blocks)
    index = 0  # the first block is the convolution that latents come in by
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
    """Collect the places' hidden states of the calls made inside the block, in the order they run."""
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
