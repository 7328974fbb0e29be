"""Start a script of this folder: a process with ComfyUI and this extension."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = "dropped_in"


def boot(comfyui: Path, root: Path) -> None:
    """Put ComfyUI on the path, on the CPU, and load the extension under the name :data:`PACKAGE`.

    In a fork this has been done by ``imported.py``.
    """
    if PACKAGE in sys.modules:
        return
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True  # before ComfyUI looks for a device
    args.use_pytorch_cross_attention = True

    spec = importlib.util.spec_from_file_location(PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)])
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
