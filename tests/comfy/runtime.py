"""``scripts/comfy_runtime.py`` as a module: it is a script of the clone, no part of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load_runtime() -> ModuleType:
    """The script's functions."""
    if "comfy_runtime" not in sys.modules:
        spec = importlib.util.spec_from_file_location("comfy_runtime", ROOT / "scripts" / "comfy_runtime.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["comfy_runtime"] = module
        spec.loader.exec_module(module)
    return sys.modules["comfy_runtime"]
