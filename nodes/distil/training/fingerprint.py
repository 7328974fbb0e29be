"""A fingerprint of everything that decides a run's result. A folder's name carries it: a run resumes only itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

VERSION = 2  # raise it where the same settings would train otherwise
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
LENGTH = 12  # hexadecimal digits in a folder's name


class Fingerprint:
    """Adds up values of many kinds."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(f"flash distil {VERSION}".encode())

    def text(self) -> str:
        """Return the fingerprint, :data:`LENGTH` hexadecimal digits."""
        return self._hash.hexdigest()[:LENGTH]

    def full(self) -> str:
        """Return all 64 hexadecimal digits."""
        return self._hash.hexdigest()

    def add(self, value: Any) -> Fingerprint:
        """Add numbers, texts, tensors, and mappings, sequences and dataclasses of them.

        A function counts with its name and with what it has closed over, a method with its object, any other object
        with its class and its plain attributes: ComfyUI's patches are such functions and objects.
        """
        self._add(value, set())
        return self

    def add_weights(self, network: nn.Module) -> Fingerprint:
        """Add all weights and buffers of a network as they are now, with all patches in place.

        Loaders of quantised files (GGUF) list weights without values; then the packed weight itself is added, with its
        attributes: the patches that it gets in each call are among them.
        """
        for name, value in network.state_dict().items():
            self._tell(name)
            if not isinstance(value, Tensor):
                continue
            if value.is_meta:
                packed = network.get_parameter(name)
                self._add(packed.__dict__, set())
                with torch._C.DisableTorchFunctionSubclass():
                    value = packed.as_subclass(Tensor)
            self._tensor(value)
        return self

    def _tell(self, text: str) -> None:
        self._hash.update(f"{len(text)}:{text};".encode())

    def _tensor(self, value: Tensor) -> None:
        self._tell(f"{value.dtype}{tuple(value.shape)}")
        values = value.detach().to("cpu").contiguous()
        self._hash.update(values.reshape(-1).view(torch.uint8).numpy().data)

    def _add(self, value: Any, seen: set[int]) -> None:
        if value is None or isinstance(value, PLAIN):
            return self._tell(repr(value))
        if isinstance(value, Tensor):
            return self._tensor(value)
        if id(value) in seen:
            return self._tell("again")
        seen = seen | {id(value)}
        if is_dataclass(value) and not isinstance(value, type):
            return self._add({field.name: getattr(value, field.name) for field in fields(value)}, seen)
        if isinstance(value, Mapping):
            self._tell(f"mapping {len(value)}")
            for key in sorted(value, key=repr):
                self._add(key, seen)
                self._add(value[key], seen)
            return None
        if isinstance(value, (list, tuple)):
            self._tell(f"sequence {len(value)}")
            for part in value:
                self._add(part, seen)
            return None
        self._tell(getattr(value, "__qualname__", type(value).__qualname__))
        if isinstance(value, nn.Module):
            self.add_weights(value)
        elif hasattr(value, "__self__"):
            self._add(value.__self__, seen)
        elif hasattr(value, "__closure__"):
            self._add([cell.cell_contents for cell in value.__closure__ or ()], seen)
        else:
            plain = {
                name: part
                for name, part in getattr(value, "__dict__", {}).items()
                if isinstance(part, (*PLAIN, Tensor))
            }
            self._add(plain, seen)
        return None
