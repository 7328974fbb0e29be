"""Load the extension as ComfyUI's own loader does (see ``test_extension.py`` and ``benchmarks/import_time.py``).

python load_extension.py COMFYUI EXTENSION

EXTENSION is the folder in custom_nodes. The last line on the output is a JSON object: whether ComfyUI loaded it, the
modules that were imported for it, and the CPU seconds of ComfyUI's core nodes and of the extension.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Import what a running ComfyUI has imported, then load the extension."""
    comfyui, extension = map(Path, sys.argv[1:])
    sys.argv = sys.argv[:1]  # ComfyUI parses the command line too
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = True
    start = time.process_time()  # of this process: other processes do not count
    import utils.extra_config  # noqa: F401  first, as in ComfyUI's main.py: ComfyUI has several modules called utils

    # isort: split
    import execution  # noqa: F401  ComfyUI's, as the following
    import latent_preview  # noqa: F401
    import server  # noqa: F401
    from comfy_config import config_parser  # noqa: F401  reads the pyproject.toml of every extension

    import nodes

    before = set(sys.modules)
    middle = time.process_time()
    loaded = asyncio.run(nodes.load_custom_node(str(extension), module_parent="custom_nodes"))
    end = time.process_time()
    seconds = {"comfyui": middle - start, "extension": end - middle}
    result = {"loaded": loaded, "modules": sorted(set(sys.modules) - before), "seconds": seconds}
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main()
