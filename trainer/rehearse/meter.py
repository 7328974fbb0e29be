"""Count what operations do: bytes alive by part and moment, FLOPs, bytes moved, and waits for the device."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..errors import UserError

PACKAGE = Path(__file__).parents[2]
HERE = Path(__file__).parent
ACTIVATIONS = "activations and gradients"
FETCHED = "fetched weights"  # of a base that waits in the computer's memory
# What products are counted as, beside the part whose weights they read.
ATTENTION, SCORES_AGAIN, AGAIN, OTHER = "attention", "attention's scores again", "recomputed", "other products"
READS_VALUE = (torch.ops.aten._local_scalar_dense.default,)
# What makes a weight of another dtype, or of bits -> which argument the weight is.
CASTS = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.embedding.default: 1}
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return count


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    count: int = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    return count


FORWARD_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# torch's own table lacks the CPU's fused attention, which stands in for the GPU's here.
FORMULAS = {**flop_registry, FORWARD_ATTENTION: _cpu_attention, BACKWARD_ATTENTION: _cpu_attention_backward}
# Of the five products of fused attention's backward pass the first makes the scores again, which it did not keep.
SCORES_OF_BACKWARD = 5


@dataclass
class Moment:
    """What was counted in one moment of an update, such as the student's step.

    Attributes:
        peak: the most bytes alive at once.
        parts: of those bytes: part -> bytes.
        flops: of matrix products, convolutions and attention; a multiplication and an addition are two.
        work: of those: the part whose weights a product reads, ``attention``, ``attention's scores again``,
            ``recomputed`` or ``other products`` -> FLOPs.
        moved: bytes of weights read and of results written: the least that passes through memory.
        crossed: bytes of waiting weights that were copied to the device.
        waits: place in the code -> how often the program waited for a value of the device.
    """

    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    work: dict[str, int] = field(default_factory=dict)
    moved: int = 0
    crossed: int = 0
    waits: dict[str, int] = field(default_factory=dict)


class Meter(TorchDispatchMode):
    """Counts inside its ``with`` block; operations run as they would without it.

    A value that a tensor without values is asked for is made up (1), and noted as a wait.

    Args:
        device: where the run's tensors are. A copy from there to the CPU is a wait, unless it is the CPU itself.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live: dict[str, int] = {}
        self.total = 0
        self.moments: dict[str, Moment] = {}
        self._now = Moment()
        self._seen: weakref.WeakKeyDictionary[Any, tuple[str, int]] = weakref.WeakKeyDictionary()
        self._finalizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._weights: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._casts: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._again = False
        self._away: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    @contextmanager
    def moment(self, name: str) -> Iterator[Moment]:
        """Count under a name inside the block; blocks of one name add up, and their peak is the highest."""
        before, self._now = self._now, self.moments.setdefault(name, Moment())
        self._look()
        try:
            yield self._now
        finally:
            self._now = before

    def own(self, part: str, tensors: Iterable[Any], weights: bool = False) -> int:
        """Say that tensors belong to a part from now on; return their bytes.

        Args:
            weights: True for tensors whose reading counts as moved bytes.
        """
        size = 0
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage in self._seen:
                self._forget(storage)
            size += self._note(storage, part)
            if weights:
                self._weights[storage] = part
        self._look()
        return size

    @contextmanager
    def again(self) -> Iterator[None]:
        """Count products inside the block as recomputed."""
        before, self._again = self._again, True
        try:
            yield
        finally:
            self._again = before

    def leave(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors no longer: they wait in the computer's memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage in self._seen:
                self._away[storage] = self._seen[storage][0]
                self._forget(storage)

    def come_back(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that have left again, for the parts that they belong to."""
        for tensor in tensors:
            part = self._away.pop(tensor.untyped_storage(), None)
            if part is not None:
                self._note(tensor.untyped_storage(), part)
        self._look()

    def wait_elsewhere(self, part: str, weights: Iterable[Tensor]) -> int:
        """Say that weights of a part wait in the computer's memory, from which :meth:`cross` is told; return bytes."""
        size = 0
        for weight in weights:
            storage = weight.untyped_storage()
            if storage in self._seen:
                self._forget(storage)
            self._weights[storage] = part
            size += int(storage.nbytes())
        return size

    def cross(self, here: Tensor, waiting: Tensor) -> None:
        """Count a copy on the device of a weight that waits in the computer's memory."""
        self._now.crossed += here.nbytes
        if (part := self._part_of(waiting)) is not None:
            self._casts[here.untyped_storage()] = part
        self.own(FETCHED, [here])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS_VALUE and self._valueless(args[0]):
            self._wait()
            return _made_up(args[0].dtype)
        if torch.is_inference_mode_enabled() and func._overloadpacket not in FORMULAS and _is_composite(func):
            with self:  # inference mode passes whole operations; count their parts, as autograd passes them
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func in COPIES and self._leaves_device(func, args, kwargs):
            self._wait()
        try:
            out = func(*args, **kwargs)
        except RuntimeError as error:
            if self.device == "cpu" or "device" not in str(error):
                raise
            found = {leaf.device.type for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
            raise UserError(
                f"{func} reads tensors of two devices, {' and '.join(sorted(found))} (which stands for the GPU), at "
                f"{_place()}: move the tensor that stayed on the CPU with .to(device)"
            ) from error
        fresh = [leaf for leaf in tree_iter(out) if isinstance(leaf, Tensor)]
        for tensor in fresh:
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._now.moved += self._note(storage, ACTIVATIONS)
        if func in CASTS and (part := self._part_of(args[CASTS[func]])) is not None:
            self._casts[out.untyped_storage()] = part
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self._count(func._overloadpacket, formula(*args, **kwargs, out_val=out), tree_iter((args, kwargs)))
        if fresh:
            self._look()
        return out

    # -- work ----------------------------------------------------------------------------------------------------

    def _count(self, operation: Any, flops: int, arguments: Iterable[Any]) -> None:
        """Count a product under the part whose weights it reads, and the bytes of those weights as moved."""
        kind = None
        for argument in arguments:
            if isinstance(argument, Tensor):
                kind = kind or self._part_of(argument)
                if argument.untyped_storage() in self._weights:
                    self._now.moved += argument.numel() * argument.element_size()
        if self._again:
            self._add(AGAIN, flops)
        elif operation is BACKWARD_ATTENTION:
            self._add(SCORES_AGAIN, flops // SCORES_OF_BACKWARD)
            self._add(ATTENTION, flops - flops // SCORES_OF_BACKWARD)
        else:
            self._add(ATTENTION if operation is FORWARD_ATTENTION else kind or OTHER, flops)

    def _add(self, kind: str, flops: int) -> None:
        self._now.flops += flops
        self._now.work[kind] = self._now.work.get(kind, 0) + flops

    def _part_of(self, tensor: Tensor) -> str | None:
        """Return the part of a weight, or of a copy of a weight in another dtype."""
        storage = tensor.untyped_storage()
        return self._weights.get(storage) or self._casts.get(storage)

    # -- bytes alive ---------------------------------------------------------------------------------------------

    def _note(self, storage: Any, part: str) -> int:
        size = int(storage.nbytes())
        self._seen[storage] = (part, size)
        self.live[part] = self.live.get(part, 0) + size
        self.total += size
        finalizer = weakref.finalize(storage, self._end, part, size)
        finalizer.atexit = False
        self._finalizers[storage] = finalizer
        return size

    def _forget(self, storage: Any) -> None:
        self._finalizers.pop(storage)()
        del self._seen[storage]

    def _end(self, part: str, size: int) -> None:
        self.live[part] -= size
        self.total -= size

    def _look(self) -> None:
        """Keep the bytes alive if there were never more in this moment."""
        if self.total > self._now.peak:
            self._now.peak = self.total
            self._now.parts = dict(self.live)

    # -- waits ---------------------------------------------------------------------------------------------------

    def _valueless(self, tensor: Tensor) -> bool:
        return tensor.is_meta or type(tensor) is not Tensor

    def _leaves_device(self, func: Any, args: Any, kwargs: Any) -> bool:
        if self.device == "cpu":
            return False
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        target = args[0].device if func is torch.ops.aten.copy_.default else kwargs.get("device")
        return source.device.type == self.device and target is not None and torch.device(target).type == "cpu"

    def _wait(self) -> None:
        place = _place()
        self._now.waits[place] = self._now.waits.get(place, 0) + 1


def _is_composite(func: Any) -> bool:
    """Return True for an operation that torch makes of others."""
    if func.namespace != "aten":
        return False
    composite: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return composite


def _made_up(dtype: torch.dtype) -> Any:
    """Return a value of a tensor that has none: one, or True."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _place() -> str:
    """Return ``folder/file.py:line`` of the code of this package that runs now, this room's own files left out."""
    frame: FrameType | None = sys._getframe(2)
    outermost = ""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        outermost = f"{path.name}:{frame.f_lineno}"
        if PACKAGE in path.parents and HERE not in path.parents and "site-packages" not in path.parts:
            return f"{path.relative_to(PACKAGE).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return outermost
