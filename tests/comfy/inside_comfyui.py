"""Run scripts inside ComfyUI's own process, and compare their results with a reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .runtime import ROOT

SCRIPTS = Path(__file__).resolve().parent / "inside"


def run_inside(runtime: ModuleType, script: str, *arguments: str | Path) -> str:
    """Run a script of ``inside/`` with ComfyUI's folder, the clone and ``arguments``; return its output."""
    command = [sys.executable, SCRIPTS / script, runtime.comfyui_folder(), ROOT, *arguments]
    done = subprocess.run(command, env=runtime.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference in units of the reference's standard deviation."""
    assert ours.shape == theirs.shape
    assert bool(torch.isfinite(theirs).all())
    return float((ours - theirs).abs().max() / theirs.std())
