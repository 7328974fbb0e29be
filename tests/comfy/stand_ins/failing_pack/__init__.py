"""A MODEL that runs out of memory once, in the tests' server only: in the backward passes' third evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FAILS_AT = 3  # evaluation with gradients of this process
evaluations = 0


def apply(model: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Call the model, or raise what torch raises."""
    global evaluations
    if torch.is_grad_enabled():
        evaluations += 1
        if evaluations == FAILS_AT:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    return model(call["input"], call["timestep"], **call["c"])


class OutOfMemoryOnce:
    """Patch a MODEL."""

    CATEGORY = "tests"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        """Return a patched clone."""
        patched = model.clone()
        patched.set_model_unet_function_wrapper(apply)
        return (patched,)


NODE_CLASS_MAPPINGS = {"OutOfMemoryOnce": OutOfMemoryOnce}
