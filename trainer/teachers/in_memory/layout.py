"""The order of a network's weights in memory."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import nn

from ...errors import UserError


def order_channels_last(network: ModelMixin) -> None:
    """Reorder the weights of a UNet's convolutions in memory; before adapters are added, which keep the usual order.

    Raises:
        UserError: the network is no UNet, so that it has (nearly) no convolutions.
    """
    if type(network).__name__ != "UNet2DConditionModel":
        raise UserError(
            f"speed.channels_last is for UNets, whose work is convolutions; {type(network).__name__} has (nearly) "
            "none. Set it to false"
        )
    module: nn.Module = network
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's overloads lack the argument
