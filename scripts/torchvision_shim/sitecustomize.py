"""Make torchvision importable with a CPU build of torch. Only for this repository's tests and demo.

The torchvision wheel of the package index is built for CUDA, so its C++ operators cannot be loaded beside a CPU-only
torch, and ``import torchvision`` then fails because two operators have no schema. Declaring the schemas is enough for
the import; nothing that ComfyUI does for this extension calls them. ``scripts/comfy_runtime.py`` puts this folder on
``PYTHONPATH`` of the processes it starts, and only where torchvision cannot be imported without it.
"""

from __future__ import annotations

import importlib.abc
import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declare the operators when torchvision is about to be imported, so that no other process pays for torch."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Find nothing; being asked for ``torchvision`` is the signal."""
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            self.library.define(schema)
        sys.modules["torchvision_shim"] = self  # type: ignore[assignment]


FINDER = DeclareOperators()  # this module keeps it, and with it the declared operators, alive
sys.meta_path.insert(0, FINDER)
