"""Scripts that run inside ComfyUI's own process, and how far what they computed lies from a reference."""

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
    """What a script of ``inside/`` prints, given ComfyUI's folder, the clone and ``arguments``; it must succeed."""
    command = [sys.executable, SCRIPTS / script, runtime.comfyui_folder(), ROOT, *arguments]
    done = subprocess.run(command, env=runtime.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the reference's standard deviation."""
    assert ours.shape == theirs.shape
    assert bool(torch.isfinite(theirs).all())
    return float((ours - theirs).abs().max() / theirs.std())
