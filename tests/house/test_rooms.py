"""Check what every file keeps to: size of files and rooms, printable text, no measured time in a test.

Every check takes the root of a repository, so that it can be shown to fail on a small bad one.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .tree import ROOMS, ROOT, assert_nothing, docstrings, lines, module_name, parse, python_files, write

LONGEST_FILE = 500  # lines
MOST_FILES = 8  # of a room, beside __init__.py
# Rooms of more files, and why.
LARGER_ROOMS = {
    "flash_core": 12,  # the method: one file for each part that papers name
    "flash_core.lora": 14,  # LoRA files: one file for each step from bytes to weights
    "trainer": 9,  # the command line, and what every room may use
    "trainer.tasks": 10,  # one file for each task, and their pictures, masks and scores
    "trainer.distill": 13,  # one file for each part of a training run
}
PRINTING = (*ROOMS, "scripts", "benchmarks")
CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "process_time_ns"}


def long_files(root: Path) -> Iterator[str]:
    """Yield a line for every file of more than LONGEST_FILE lines."""
    for path in python_files(root, *PRINTING):
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > LONGEST_FILE:
            yield f"{path.relative_to(root)} has {length} lines. Split it into files of one idea each."


def crowded_rooms(root: Path) -> Iterator[str]:
    """Yield a line for every room of more files than it may have."""
    rooms = Counter(module_name(root, path.parent / "__init__.py") for path in module_files(root))
    for room, count in rooms.items():
        most = LARGER_ROOMS.get(room, MOST_FILES)
        if count > most:
            yield f"{room} has {count} files, at most {most} are allowed. Make a room inside it."


def module_files(root: Path) -> Iterator[Path]:
    """Yield every Python file of the package's rooms but ``__init__.py`` and ``__main__.py``."""
    for path in python_files(root, *ROOMS):
        if not path.name.startswith("__"):
            yield path


def unprintable_texts(root: Path) -> Iterator[str]:
    """Yield a line for every string, docstrings aside, that a Windows console (code page 1252) cannot print."""
    for path in python_files(root, *PRINTING):
        tree = parse(path)
        comments = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in comments:
                signs = "".join(sorted({sign for sign in node.value if not printable(sign)}))
                if signs:
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    yield f"{where} has {signs!a}. Use a word, or put the sign into an HTML template."


def printable(sign: str) -> bool:
    """Return True if a Windows console (code page 1252) can print a sign."""
    try:
        sign.encode("cp1252")
    except UnicodeEncodeError:
        return False
    return True


def timed_assertions(root: Path) -> Iterator[str]:
    """Yield a line for every ``assert`` of a test whose value comes from a clock."""
    for path in python_files(root, "tests"):
        tree = parse(path)
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
                times = timed_names(scope)
                for node in ast.walk(scope):
                    if isinstance(node, ast.Assert) and reads_clock(node.test, times):
                        yield f"{path.relative_to(root)}:{node.lineno} asserts a time. A busy machine makes it fail."


def timed_names(scope: ast.AST) -> set[str]:
    """Return the names that a function computes from a clock."""
    names: set[str] = set()
    grown = True
    while grown:
        found = {
            target.id
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign) and reads_clock(node.value, names)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        grown = bool(found - names)
        names |= found
    return names


def reads_clock(node: ast.AST, names: set[str]) -> bool:
    """Return True if an expression calls a clock, or reads a name that was computed from one."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in names | CLOCKS:
            return True
        if isinstance(part, ast.Attribute) and (part.attr in CLOCKS or ast.unparse(part) == "time.time"):
            return True
    return False


def test_no_file_is_too_long() -> None:
    assert_nothing(long_files(ROOT))


def test_no_room_is_crowded() -> None:
    assert_nothing(crowded_rooms(ROOT))


def test_windows_consoles_can_print_every_text() -> None:
    assert_nothing(unprintable_texts(ROOT))


def test_no_test_asserts_a_time() -> None:
    assert_nothing(timed_assertions(ROOT))


TIMED = """
def test_fast():
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    assert seconds < 1
"""
BAD = {
    "a long file": (long_files, {"trainer/config.py": "x = 1\n" * 501}, "trainer/config.py has 501 lines"),
    "a crowded room": (
        crowded_rooms,
        {f"trainer/data/part_{number}.py": "" for number in range(9)},
        "trainer.data has 9 files, at most 8",
    ),
    "an arrow sign": (unprintable_texts, {"nodes/a.py": 'print("a \u2192 b")'}, "nodes/a.py:1 has '\\u2192'"),
    "a check mark in an f-string": (
        unprintable_texts,
        {"scripts/a.py": 'def f(x):\n    raise ValueError(f"{x} \u2713 {x}")'},
        "scripts/a.py:2 has '\\u2713'",
    ),
    "a measured time": (timed_assertions, {"tests/test_a.py": TIMED}, "tests/test_a.py:6 asserts a time"),
    "a time at once": (
        timed_assertions,
        {"tests/test_a.py": "def test_a():\n    assert monotonic() < 3"},
        "tests/test_a.py:2 asserts a time",
    ),
}
GOOD = {
    "trainer/config.py": "x = 1\n" * 500,
    "trainer/data/a.py": '"""Map a \u2192 b."""\nprint("1\u20134 steps, 2 \u00d7 2, Fr\u00e9chet")  # \u2192',
    "tests/test_a.py": "def test_a():\n    begin = time.time()\n    log(begin)\n    assert work() == 1",
}


@pytest.mark.parametrize("case", BAD)
def test_the_checks_find(case: str, tmp_path: Path) -> None:
    check, files, finding = BAD[case]
    write(tmp_path, files)
    assert finding in lines(check(tmp_path))


def test_the_checks_accept_good_files(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    for check in (long_files, crowded_rooms, unprintable_texts, timed_assertions):
        assert not lines(check(tmp_path))
