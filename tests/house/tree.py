"""Read a repository's Python files as text: modules, imports, printed strings. Nothing is imported or run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("flash_core", "nodes", "trainer")


@dataclass(frozen=True)
class Import:
    """One import.

    Args:
        source: the module that imports, e.g. ``trainer.files``; the package's own ``__init__.py`` is ``__init__``.
        target: the imported module: one of the repository's with its room, or another one, e.g. ``torch.nn``.
        line: the line number in the source.
        when: "start" = when the module is imported, "call" = inside a function, "types" = only for a type checker.
        relative: it begins with a dot.
    """

    source: str
    target: str
    line: int
    when: Literal["start", "call", "types"]
    relative: bool

    def __str__(self) -> str:
        return f"{self.source} (line {self.line}) imports {self.target}"


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def python_files(root: Path, *folders: str) -> list[Path]:
    """Return all Python files below some folders of a repository."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def module_name(root: Path, path: Path) -> str:
    """Return the dotted name of a file; a package's ``__init__.py`` has the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def module_exists(root: Path, name: str) -> bool:
    """Return True if a dotted name is a file or a folder of the repository."""
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def nodes_with_time(tree: ast.Module) -> Iterator[tuple[ast.AST, Literal["start", "call", "types"]]]:
    """Yield every node of a tree and when its code runs (see :class:`Import`)."""

    def walk(node: ast.AST, when: Literal["start", "call", "types"]) -> Iterator[tuple[ast.AST, str]]:
        yield node, when
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "start":
            when = "call"
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            when = "types"
        for child in ast.iter_child_nodes(node):
            yield from walk(child, when)

    yield from walk(tree, "start")  # type: ignore[misc]


def imports(root: Path, path: Path) -> Iterator[Import]:
    """Yield all imports of a file."""
    source = module_name(root, path)
    package = path.relative_to(root).parent.parts
    for node, when in nodes_with_time(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, alias.name, node.lineno, when, relative=False)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield Import(source, node.module or "", node.lineno, when, relative=False)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + tuple(filter(None, (node.module or "").split(".")))
            for alias in node.names:
                inner = ".".join((*base, alias.name))
                target = inner if module_exists(root, inner) else ".".join(base) or "__init__"
                yield Import(source, target, node.lineno, when, relative=True)


def own_imports(root: Path) -> list[Import]:
    """Return all imports between the repository's own modules."""
    found = []
    for path in [*python_files(root, *ROOMS), root / "__init__.py"]:
        if path.is_file():
            found += [entry for entry in imports(root, path) if entry.relative and entry.source != entry.target]
    return found


def docstrings(tree: ast.Module) -> set[int]:
    """Return the ``id`` of every docstring's node."""
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }


def lines(found: Iterator[str]) -> str:
    """Return what a check found, one finding a line; empty if there is nothing."""
    return "\n".join(sorted(found))


def assert_nothing(found: Iterator[str]) -> None:
    """Fail with the findings of a check."""
    if text := lines(found):
        pytest.fail(text, pytrace=False)


def write(root: Path, files: dict[str, str]) -> None:
    """Write a small repository: file name -> text."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
