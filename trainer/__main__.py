"""``python -m trainer`` in a clone, or this file by its path: load the root package, then run the command line.

The tree is one package whose root is this file's parent folder. In a clone nothing is installed under that name, so it
is loaded here from its file; an installed copy (wheel or editable) never reaches this path.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

PACKAGE = "flash_diffusion"


def load_package(root: Path) -> None:
    """Register the folder ``root`` as the package ``flash_diffusion``, unless one is already imported."""
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)])
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load the package from {root}: no __init__.py there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0]).resolve() == here:
        del sys.path[0]  # started by its path: this folder's files must not pass for libraries of their names
    load_package(here.parent)
    sys.exit(importlib.import_module(f"{PACKAGE}.trainer.cli").main())
