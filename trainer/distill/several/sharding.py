"""Share the frozen base's weights among the processes of a run (FSDP2), so that each device holds only a part of them.

The LoRAs, the heads and their optimisers stay whole in every process: they are small, and their gradients are averaged
by hand (``update.py``). A block's weights are gathered when the block runs, in every role and in both halves of the
split backward pass. So all processes must call the network equally often: see ``SharedBatch.lockstep``.
"""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ...errors import UserError

logger = logging.getLogger(__name__)


def shard_base(network: nn.Module, accelerator: Accelerator) -> None:
    """Share a frozen network's weights among the processes; its LoRA layers stay whole.

    Args:
        network: on the process's device, with its adapters. Its blocks are what diffusers calls ``_no_split_modules``.

    Raises:
        UserError: there is one process only, the network names no blocks, or torch is older than 2.6.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise UserError(f"sharding: base needs torch 2.6 or newer, got {torch.__version__}") from error
    if accelerator.num_processes == 1:
        raise UserError(
            "sharding: base shares the base's weights among processes, but there is one process; start several with "
            "`accelerate launch` or `torchrun`, or set sharding to none"
        )
    names = set(getattr(network, "_no_split_modules", None) or ())
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(f"sharding: base does not know the blocks of a {type(network).__name__}; set sharding to none")
    adapters = {value for name, value in network.named_parameters() if ".lora_" in name}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in [*reversed(blocks), network]:  # inner blocks before those that hold them
        fully_shard(module, mesh=mesh, ignored_params=adapters)
    whole = sum(value.numel() * value.element_size() for value in network.parameters() if value not in adapters)
    if accelerator.is_main_process:
        logger.info(
            "the base's weights, %.2f GB, are shared among %d processes", whole / 1e9, accelerator.num_processes
        )
