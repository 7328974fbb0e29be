"""torch.compile for the repeated blocks of a network, each where it stands.

A block's ``forward`` is replaced by its compiled one, and nothing else changes: names of weights, PEFT's layers and
hooks stay. Hooks run outside of what is compiled, so that hidden states are read as ever. Every role, and a pass with
and without gradients, is compiled once for each size of blocks, when it is first asked; later ones are found by torch's
guards.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from ...errors import UserError

BACKEND = "inductor"
OLDEST = (2, 6)
# Variants of a block's code that torch keeps: roles x gradients x sizes x kinds of batches, of which 8 are too few. A
# variant above the limit runs without torch.compile, which torch warns of.
VARIANTS = 128


class CompileClock:
    """Counts what torch.compile takes in this process, from when it is made.

    Attributes:
        seconds: spent compiling.
        count: compilations; those that torch makes inside another one are not counted.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0
        self._begun = 0.0
        # Older torch has no such callbacks, and importing them takes a second that few runs need.
        from torch._dynamo.callback import on_compile_end, on_compile_start

        on_compile_start(self._begin)
        on_compile_end(self._end)

    def _begin(self, *_: Any) -> None:
        self._begun = time.monotonic()

    def _end(self, *_: Any) -> None:
        self.seconds += time.monotonic() - self._begun
        self.count += 1

    def __str__(self) -> str:
        """Return the figures in words."""
        return f"torch.compile: {self.count} variants of blocks, {self.seconds:.0f} s so far"


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of which a network has many: those that diffusers names, else its transformer blocks."""
    names = getattr(network, "_repeated_blocks", None) or ()
    if names:
        return [module for module in network.modules() if type(module).__name__ in names]
    return list(getattr(network, "transformer_blocks", ()))


def compile_blocks(network: ModelMixin, device: torch.device) -> CompileClock:
    """Compile a network's repeated blocks when they are first called; return what counts the time.

    Call it when all adapters are added.

    Args:
        device: where the network runs.

    Raises:
        UserError: torch is older than 2.6, it can't compile on this machine, or the network has no repeated blocks.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST:
        raise UserError(f"speed.compile needs torch 2.6 or newer, got {torch.__version__}; set it to none, or update")
    blocks = blocks_of(network)
    if not blocks:
        raise UserError(f"speed.compile does not know the blocks of a {type(network).__name__}; leave it out")
    _check_compiler(device)
    clock = CompileClock()
    torch._dynamo.config.cache_size_limit = max(VARIANTS, torch._dynamo.config.cache_size_limit)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=BACKEND)
    return clock


def _check_compiler(device: torch.device) -> None:
    """Compile one line, so that a machine without a compiler is known now and not in the first update."""
    try:
        torch.compile(_one_line, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # torch raises many kinds; each means the same here
        reason = " ".join(str(error).strip().splitlines()[:2])  # the backend's name comes before its reason
        raise UserError(
            f"speed.compile: torch.compile does not work on {device.type} here ({type(error).__name__}: {reason}). It "
            "needs a C++ compiler for a CPU, and Triton for CUDA; install them, or leave out speed.compile"
        ) from error


def _one_line(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
