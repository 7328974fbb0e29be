"""Gradient checkpointing (arXiv 1604.06174) for ComfyUI's networks: blocks compute their activations again.

The backward pass then needs the activations of one block at a time, and one more forward pass. Results differ by
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

OUT_OF_PLACE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    Tensor.__iadd__: torch.add,
    Tensor.__imul__: torch.mul,
    Tensor.add_: torch.add,
    Tensor.mul_: torch.mul,
}


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the modules whose activations are large: those in the network's lists of blocks.

    ComfyUI's UNet calls the layers of a block one by one and never the block, so its layers are returned.
    """
    found: list[nn.Module] = []
    for stack in network.children():
        if isinstance(stack, nn.ModuleList):
            for block in stack:
                found += list(block) if isinstance(block, nn.Sequential) else [block]
        elif isinstance(stack, nn.Sequential) and stack is getattr(network, "middle_block", None):
            found += list(stack)
    return found


@contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Checkpoint the blocks of a network inside the block; no weight and no output changes.

    Raises:
        ValueError: the network has no lists of blocks.
    """
    blocks = blocks_of(network)
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} has no lists of blocks, so gradient checkpointing cannot divide it. Turn "
            "'checkpointing' off."
        )
    try:
        for block in blocks:
            block.forward = _again_in_backward(block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)  # the class's own forward shows again


def _again_in_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        # ComfyUI writes the number of the running block into the options: keep them as they are now.
        arguments, named = _kept(arguments), _kept(named)

        def call() -> Any:
            with _OutOfPlace():
                return forward(*_kept(arguments), **_kept(named))

        return checkpoint(call, use_reentrant=False, preserve_rng_state=False)

    return run


class _OutOfPlace(TorchFunctionMode):
    """Give ``a += b`` and ``a *= b`` new tensors.

    Flux's blocks add to their hidden states in place. A checkpoint keeps no copy of what the backward pass needs of a
    tensor before that, so its gradients would be wrong, without an error.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = OUT_OF_PLACE.get(function)
        if operation is None:
            return function(*args, **(kwargs or {}))
        return operation(*args, **(kwargs or {})).to(args[0].dtype)


def _kept(value: Any) -> Any:
    """Copy containers, not what they hold."""
    if isinstance(value, dict):
        return {name: _kept(part) for name, part in value.items()}
    return tuple(_kept(part) for part in value) if type(value) is tuple else value
