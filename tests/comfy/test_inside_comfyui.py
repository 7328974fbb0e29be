"""Scripts inside ComfyUI: what one changes does not reach the next, and one that fails is a failure with its words."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy


def test_what_a_script_changes_in_comfyui_ends_with_it(runtime: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import comfy.sd, folder_paths, sys, torch\n"
        "print(__name__, len(sys.argv), 'loras' in folder_paths.folder_names_and_paths, bool(comfy.sd.CLIP),\n"
        "    torch.initial_seed() == 1)\n"
        "folder_paths.folder_names_and_paths.clear()\n"
        "comfy.sd.CLIP = None\n"
        "torch.manual_seed(1)\n"
    )
    assert [run_inside(runtime, script) for _ in range(2)] == ["__main__ 3 True True False\n"] * 2


def test_a_script_that_fails_is_a_failure_with_its_words(runtime: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise KeyError('lost')")
    with pytest.raises(AssertionError, match=r"script\.py ended with code 1\n(.|\n)*KeyError: 'lost'"):
        run_inside(runtime, script)
