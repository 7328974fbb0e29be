"""The house's walls: which room may import which library and which other room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN = {
    "flash_core": {
        "comfy",
        "comfy_api",
        "folder_paths",
        "diffusers",
        "transformers",
        "peft",
        "accelerate",
        "trainer",
        "nodes",
    },
    "nodes": {"diffusers", "peft", "accelerate", "trainer", "pydantic", "webdataset"},
    "trainer": {"comfy", "comfy_api", "folder_paths", "nodes"},
}
ALLOWED_IN_CORE = {"torch", "einops", "safetensors"}


def imports(path: Path) -> set[str]:
    """The top-level names a file imports, relative ones resolved to the room they lie in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            target = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            names.add(target[0] or "__init__")
    return names


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_what_they_may(room: str) -> None:
    assert sources(room)
    for path in sources(room):
        wrong = imports(path) & FORBIDDEN[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_core_needs_nothing_but_torch_einops_and_safetensors() -> None:
    import sys

    allowed = ALLOWED_IN_CORE | set(sys.stdlib_module_names) | {"flash_core"}
    for path in sources("flash_core"):
        assert imports(path) <= allowed, f"{path.relative_to(ROOT)} imports {sorted(imports(path) - allowed)}"


def test_nothing_is_ever_unpickled() -> None:
    for room in ("flash_core", "nodes", "trainer", "scripts"):
        for path in sources(room):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    "torch.load",
                    "pickle.load",
                    "pickle.loads",
                ):
                    assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno} may unpickle"
