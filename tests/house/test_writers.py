"""Check that the trainer writes every file whole or not at all.

Every check takes the root of a repository, so that it can be shown to fail on a small bad one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .tree import ROOT, assert_nothing, lines, parse, python_files, write

WRITERS = {"write_text", "write_bytes", "save_file"}
# Their `write` argument gets the hidden name that the content has until it is complete.
WHOLE = {"write_whole", "replace_folder"}


def half_written_files(root: Path) -> Iterator[str]:
    """Yield a line for every call that writes a file under its final name.

    A call is right inside an argument of WHOLE, and where it names the ``partial`` file that it writes.
    """
    for path in python_files(root, "trainer"):
        tree = parse(path)
        whole = {
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in WHOLE
            for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and writes(node) and node not in whole and "partial" not in ast.unparse(node):
                yield f"{path.relative_to(root)}:{node.lineno} may leave half a file: {ast.unparse(node)}"


def writes(call: ast.Call) -> bool:
    """Return True if a call writes a file: by its name, or by an ``open`` that empties the file."""
    name = ast.unparse(call.func).rpartition(".")[2]
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [value.value for value in arguments if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return name in WRITERS or (name == "open" and any(mode in {"w", "wb", "x", "xb", "w+", "wb+"} for mode in modes))


def test_the_trainer_writes_files_whole() -> None:
    assert_nothing(half_written_files(ROOT))


BAD = {
    "a text": ('def f(path):\n    path.write_text("a")', "trainer/a.py:2 may leave half a file"),
    "tensors": ('save_file(tensors, folder / "a.safetensors")', "trainer/a.py:1 may leave half a file"),
    "an open file": ('with path.open(mode="wb") as file:\n    pass', "trainer/a.py:1 may leave half a file"),
}
GOOD = """
write_whole(path, lambda hidden: hidden.write_text("a"))
save_file(tensors, partial / "a.safetensors")
with path.open("a") as log, path.open("rb") as content, path.open() as text:
    pass
"""


@pytest.mark.parametrize("case", BAD)
def test_the_check_finds(case: str, tmp_path: Path) -> None:
    source, finding = BAD[case]
    write(tmp_path, {"trainer/a.py": source})
    assert finding in lines(half_written_files(tmp_path))


def test_the_check_accepts_files_written_whole(tmp_path: Path) -> None:
    write(tmp_path, {"trainer/a.py": GOOD})
    assert not lines(half_written_files(tmp_path))
