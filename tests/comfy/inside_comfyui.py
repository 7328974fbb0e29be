"""Run scripts inside ComfyUI's own process, and compare their results with a reference."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..forks.client import Forks
from .runtime import ROOT

SCRIPTS = Path(__file__).resolve().parent / "inside"


@cache
def forks_of(runtime: ModuleType) -> Forks:
    """Return the session's process that has imported ComfyUI and this extension; the fixture ``runtime`` ends it."""
    return Forks([SCRIPTS / "imported.py", runtime.comfyui_folder(), ROOT], runtime.environment())


def run_inside(runtime: ModuleType, script: str | Path, *arguments: str | Path | int, fresh: bool = False) -> str:
    """Run a script of ``inside/`` with ComfyUI's folder, the clone and ``arguments``; return its output.

    Args:
        fresh: run it in a new process, rather than in a fork of one that has imported ComfyUI.
    """
    command = [SCRIPTS / script, runtime.comfyui_folder(), ROOT, *map(str, arguments)]
    if fresh:
        environment = runtime.environment()
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        output, errors = done.stdout, done.stderr
    else:
        done = forks_of(runtime).start(command, ROOT)
        try:
            output, errors = done.communicate()
        finally:
            done.kill()  # a time limit and Ctrl-C end the script too
    assert done.returncode == 0, f"{script} ended with code {done.returncode}\n{errors}"
    return output


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference in units of the reference's standard deviation."""
    assert ours.shape == theirs.shape
    assert bool(torch.isfinite(theirs).all())
    return float((ours - theirs).abs().max() / theirs.std())
