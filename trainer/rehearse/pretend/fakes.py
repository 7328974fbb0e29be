"""Modules without values: tensors that know their shape, dtype and device and take no memory (torch's FakeTensor).

Only weights are made here as such tensors. Everything that is computed from a weight has no values either; what is
computed without weights (noise tables, grids, drawn starts) stays real, so that its values can be read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ...teachers.in_memory.waiting import waiting_weights

# Runs its operations on a device in name only. Unlike ``cuda``, torch without CUDA takes it, and mixing it with the
# CPU raises an error.
PRETEND_DEVICE = "meta"
CPU = torch.device("cpu")
# Operations that CUDA's autocast computes in float32 and the CPU's does not (torch's documentation of torch.amp, "CUDA
# Ops that can autocast to float32"), as far as diffusers' networks and this package call them.
FLOAT32_ON_CUDA: frozenset[Callable[..., Any]] = frozenset({
    F.layer_norm, F.group_norm, F.softmax, F.mse_loss, F.l1_loss, F.softplus, F.normalize, torch.layer_norm,
    torch.group_norm, torch.softmax, torch.norm, torch.pow, torch.rsqrt, torch.sum, torch.exp, torch.log,
    Tensor.softmax, Tensor.norm, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.sum, Tensor.exp, Tensor.log,
})  # fmt: skip


class Fakes:
    """Makes modules and tensors without values, all of one kind, on one device.

    Args:
        device: ``cpu``, or ``PRETEND_DEVICE`` to find tensors that were forgotten on the CPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def module(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace the weights of a module, on any device, by such without values; return the module.

        Weights that wait in the computer's memory are on the CPU.

        Args:
            dtype: of its floating-point tensors; None keeps each one's own.
        """
        shared: dict[int, nn.Parameter] = {}
        waiting = {id(value) for value in waiting_weights(module)}
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    if id(value) not in shared:
                        fake = self.tensor(value, dtype, CPU if id(value) in waiting else None)
                        shared[id(value)] = nn.Parameter(fake, value.requires_grad)
                    part._parameters[name] = shared[id(value)]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.tensor(buffer, dtype)
        return module

    def tensor(self, like: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """Return a tensor without values in the shape of ``like``.

        Args:
            dtype: for floating-point tensors; None keeps that of ``like``.
            device: None for that of all.
        """
        kept = like.dtype if dtype is None or not like.is_floating_point() else dtype
        with self._mode:
            return torch.empty_strided(like.shape, like.stride(), dtype=kept, device=device or self.device)


class CudaPrecision(TorchFunctionMode):
    """Computes on the CPU in the precision of CUDA's autocast: norms, sums and losses in float32.

    Their results are what a backward pass keeps, so that memory would be underrated without it.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(value) for value in args)
            kwargs = {name: _float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    reduced = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if reduced else value


@dataclass(frozen=True)
class PretendAccelerator:
    """One process of accelerate, as far as an update asks for it.

    Args:
        device: of the run's tensors.
        precision: ``no`` or ``bf16``.
    """

    device: torch.device
    precision: str
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def autocast(self) -> AbstractContextManager[Any]:
        """Return accelerate's autocast, as it is on a GPU."""
        if self.precision != "bf16" or self.device.type != "cpu":
            return nullcontext()
        return _autocast()


@contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), CudaPrecision():
        yield


def checkpoint_on_cuda(again: Callable[[], AbstractContextManager[Any]]) -> Callable[..., Any]:
    """Return a function that checkpoints a block as diffusers does, computed again in the precision of its first run.

    Args:
        again: makes a context around the second run.
    """

    @contextmanager
    def second_run() -> Iterator[None]:
        # torch calls a backward pass with all modes off: the one for the precision is put on again.
        with CudaPrecision(), again():
            yield

    def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), second_run()))

    return checkpointed


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings about tensors without values, which are none of the user's business."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta.*", category=UserWarning)
        yield
