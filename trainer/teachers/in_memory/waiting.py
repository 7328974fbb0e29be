"""A base whose weights wait in the computer's memory, for cards that can't hold it."""

from __future__ import annotations

from torch import nn

from .compact import PLAIN, SCALE, WEIGHT, Stored, block_layers, store
from .courier import Courier


def keep_off_device(network: nn.Module, courier: Courier) -> None:
    """Let the weights of the linear layers and convolutions in a network's blocks wait in the computer's memory.

    Each layer fetches its own in the forward and again in the backward pass; values do not change. Embeddings, norms,
    biases and the last layer stay where they are. Call it before adapters are added.

    Args:
        network: its weights may be stored in few bits (:func:`.compact.store_compactly`): then fewer bytes are copied.
        courier: brings the weights.
    """
    for layer in block_layers(network):
        if not isinstance(layer, Stored):
            store(layer, PLAIN)
        for name in (WEIGHT, SCALE):
            value = layer._parameters[name]
            if value is not None:
                layer._parameters[name] = nn.Parameter(courier.home(value), requires_grad=False)
        layer.courier = courier


def waiting_weights(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a network that wait in the computer's memory."""
    layers = [layer for layer in network.modules() if isinstance(layer, Stored) and layer.courier is not None]
    found = [layer._parameters[name] for layer in layers for name in (WEIGHT, SCALE)]
    return [value for value in found if value is not None]
