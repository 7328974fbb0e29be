"""A stand-in for the loaders of quantised files that wrap ComfyUI's layers (ComfyUI-GGUF). Import it after boot.

It has the habits of such loaders that can break a training: a tensor class that tells the shape of its values and not
of its bytes, and whose ``clone`` gives itself back; layers that unpack the weight in each call; a state dict without
values; a patcher that keeps patches beside the packed weight.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

SCALE_BYTES = 4  # of a float32 in front of each row


class PackedTensor(Tensor):
    """A matrix as rows of bytes: a float32 scale, then a signed byte for each value."""

    values_shape: torch.Size
    patches: list[Any]

    @classmethod
    def pack(cls, weight: Tensor) -> PackedTensor:
        """Pack a matrix (out, in)."""
        scale = weight.abs().amax(1, keepdim=True) / 127
        values = (weight / scale).round().to(torch.int8)
        packed = torch.cat([scale.view(torch.int8), values], 1).as_subclass(cls)
        packed.values_shape, packed.patches = weight.shape, []
        return packed

    def unpack(self) -> Tensor:
        """Return the matrix, float32."""
        with torch._C.DisableTorchFunctionSubclass():
            data = self.as_subclass(Tensor)
            return data[:, SCALE_BYTES:].float() * data[:, :SCALE_BYTES].contiguous().view(torch.float32)

    @property
    def shape(self) -> torch.Size:
        """The shape of the values."""
        return self.values_shape

    def to(self, *arguments: Any, **named: Any) -> PackedTensor:
        """Keep the attributes."""
        moved = super().to(*arguments, **named)
        moved.__dict__.update(self.__dict__)
        return moved

    def detach(self) -> PackedTensor:
        """Return the tensor itself."""
        return self

    def clone(self, **_: Any) -> PackedTensor:
        """Return the tensor itself."""
        return self


class PackedOps(comfy.ops.manual_cast):
    """ComfyUI's layers; the linear ones keep a packed weight."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
            self.weight = nn.Parameter(PackedTensor.pack(state[f"{prefix}weight"]), False)
            if self.bias is not None:
                self.bias = nn.Parameter(state[f"{prefix}bias"], False)

        def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
            destination[f"{prefix}weight"] = torch.zeros(self.weight.shape, device="meta")
            if self.bias is not None:
                destination[f"{prefix}bias"] = self.bias

        def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
            weight = self.weight.unpack()
            for key, patches in self.weight.patches:
                weight = comfy.lora.calculate_weight(patches, weight, key)
            return nn.functional.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Keeps the patches of a packed weight beside it, where the layer finds them."""

    def patch_weight_to_device(self, key: str, device_to: Any = None, inplace_update: bool = False) -> None:
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, PackedTensor):
            super().patch_weight_to_device(key, device_to, inplace_update)
        elif key in self.patches:
            weight.patches = [(key, self.patches[key])]

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            for weight in self.model.parameters():
                if isinstance(weight, PackedTensor):
                    weight.patches = []
        super().unpatch_model(device_to, unpatch_weights)


def packed(config: Any, weights: dict[str, Tensor]) -> PackedPatcher:
    """Build a MODEL of a family's ``config`` with its linear layers packed.

    Args:
        config: ComfyUI's, as ``tiny_native.native_config`` gives it.
        weights: of the network, float32.
    """
    config.custom_operations = PackedOps
    model = config.get_model({}, "")
    model.diffusion_model.load_state_dict(weights)
    cpu = torch.device("cpu")
    return PackedPatcher(model.eval(), cpu, cpu)
