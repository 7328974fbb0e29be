"""Run a benchmark's measurement in a process of the fetched ComfyUI (``scripts/comfy_runtime.py fetch``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def boot_comfyui(comfyui: str) -> None:
    """In the new process: load ComfyUI, and this extension as ``dropped_in``, on one thread of the CPU."""
    sys.path.insert(0, str(ROOT / "tests" / "comfy" / "inside"))
    from boot import boot

    boot(Path(comfyui), ROOT)
    import torch

    torch.set_num_threads(1)


def run_inside(script: str, arguments: list[str]) -> Any:
    """Run ``script --inside COMFYUI ARGUMENTS``, and return the JSON of its last line.

    Raises:
        SystemExit: the process failed; its errors are on ``stderr``.
    """
    sys.path.insert(0, str(ROOT / "scripts"))
    import comfy_runtime

    command = [sys.executable, script, "--inside", str(comfy_runtime.comfyui_folder()), *arguments]
    environment = {**comfy_runtime.environment(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])
