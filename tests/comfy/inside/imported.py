"""Import ComfyUI and this extension, for the processes that run the scripts of this folder (``tests/forks``).

python imported.py COMFYUI ROOT
"""

from __future__ import annotations

import sys
from pathlib import Path

from boot import boot

boot(*map(Path, sys.argv[1:]))

import dropped_in.nodes  # noqa: E402, F401  and with it ComfyUI
