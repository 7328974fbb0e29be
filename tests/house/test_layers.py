"""Check the floors of the house: which module may import which other module, and which library.

Every check takes the root of a repository, so that it can be shown to fail on a small bad one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from .tree import (
    ROOMS,
    ROOT,
    Import,
    assert_nothing,
    imports,
    lines,
    module_name,
    own_imports,
    parse,
    python_files,
    write,
)

# From bottom to top. A module may import from its own room and from lower floors. Rooms on one floor do not know each
# other. A new room, or a new file beside the rooms, needs a place here.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("flash_core",),
    # nodes
    ("nodes.shared",),
    ("nodes.lora", "nodes.demo"),
    ("nodes.sampling",),
    ("nodes.distil.training",),
    ("nodes.picture", "nodes.control", "nodes.distil", "nodes.evaluate"),
    ("nodes.headless",),
    ("nodes",),
    # trainer
    ("trainer.errors", "trainer.interrupts", "trainer.progress", "trainer.seeds", "trainer.pictures"),
    ("trainer.needs",),
    ("trainer.files",),
    ("trainer.config",),
    ("trainer.recipes", "trainer.demo"),
    ("trainer.metrics", "trainer.health"),
    ("trainer.teachers.loading",),
    ("trainer.teachers.conditions", "trainer.teachers.in_memory"),
    ("trainer.teachers",),
    ("trainer.teachers.families", "trainer.tasks"),
    ("trainer.data", "trainer.data.remote"),
    ("trainer.data.reading",),
    ("trainer.data.cache",),
    ("trainer.data.encoding",),
    ("trainer.data.streaming",),
    ("trainer.data.batches", "trainer.data.checking"),
    ("trainer.report",),
    ("trainer.evaluate",),
    ("trainer.export",),
    ("trainer.distill",),
    ("trainer.rehearse.pretend",),
    ("trainer.rehearse",),
    ("trainer.distill.command",),
    ("trainer.demo.making", "trainer.lora_command"),
    ("trainer.cli",),
    ("trainer", "trainer.__main__"),
)
# The root package holds the version, which every floor may read, and ComfyUI's entry point, which starts the nodes.
ROOT_PACKAGE = "__init__"

ALWAYS = {"flash_core": {"torch", "einops", "safetensors"}}
NEVER = {
    "nodes": {"diffusers", "transformers", "peft", "accelerate", "pydantic", "webdataset", "kornia", "torchmetrics"},
    "trainer": {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server"},
}
# A library that only some rooms may import.
LIBRARY_ROOMS = {
    "diffusers": ("trainer.teachers", "trainer.demo.making", "trainer.rehearse.pretend"),
    "peft": ("trainer.teachers", "trainer.demo.making"),
    "transformers": (
        "trainer.teachers",
        "trainer.demo.making",
        "trainer.metrics",
        "trainer.tasks",
        "trainer.rehearse.pretend",
    ),
    "torchmetrics": ("trainer.metrics",),
    "kornia": ("trainer.tasks",),
    "webdataset": ("trainer.data", "trainer.demo"),
    "accelerate": (
        *("trainer.data", "trainer.distill", "trainer.evaluate", "trainer.teachers", "trainer.demo.making"),
        *("trainer.interrupts", "trainer.rehearse.pretend"),
    ),
    "jinja2": ("trainer.report",),
}
# `flash-diffusion --help` imports none of them: it would take seconds.
SLOW = {
    *("accelerate", "diffusers", "huggingface_hub", "jinja2", "kornia", "numpy", "peft", "PIL", "safetensors"),
    *("tensorboard", "torch", "torchmetrics", "transformers", "webdataset"),
}
LOADS = ("torch.load", "pickle.load", "pickle.loads")


def room_of(module: str) -> str | None:
    """Return the entry of FLOORS with the longest name that holds a module, None if there is none."""
    entries = [entry for floor in FLOORS for entry in floor]
    holding = [
        entry
        for entry in entries
        if module == entry or (module.startswith(f"{entry}.") and ("." in entry or entry == "flash_core"))
    ]
    return max(holding, key=len, default=None)


def floor_of(room: str) -> int:
    """Return the number of a room's floor, 0 = the lowest."""
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def homeless_modules(root: Path) -> Iterator[str]:
    """Yield a line for every module that lies in no room."""
    for path in python_files(root, *ROOMS):
        if room_of(module_name(root, path)) is None:
            yield f"{path.relative_to(root)} lies in no room. Put it into a room, or give a new room a place in FLOORS."


def wrong_arrows(root: Path) -> Iterator[str]:
    """Yield a line for every import that leads up, or to another room of the same floor."""
    for entry in own_imports(root):
        if ROOT_PACKAGE in (entry.source, entry.target):
            continue
        source, target = room_of(entry.source), room_of(entry.target)
        if source is None or target is None or source == target:
            continue
        crosses = {source.split(".")[0], target.split(".")[0]} == {"nodes", "trainer"}
        if crosses or floor_of(target) >= floor_of(source):
            yield f"{entry}: {target} is not below {source}"


def circles(root: Path) -> Iterator[str]:
    """Yield a line for every circle of files, imports in functions and for types included."""
    arrows: dict[str, set[str]] = {}
    for entry in own_imports(root):
        arrows.setdefault(entry.source, set()).add(entry.target)
    reached = {module: closure(arrows, module) for module in arrows}
    rings = {frozenset(other for other in reached[module] if module in reached.get(other, ())) for module in arrows} - {
        frozenset()
    }
    yield from (" <-> ".join(sorted(ring)) for ring in rings)


def closure(arrows: Mapping[str, set[str]], start: str) -> set[str]:
    """Return all modules that a module reaches in one step or more."""
    reached: set[str] = set()
    waiting = list(arrows.get(start, ()))
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting.extend(arrows.get(module, ()))
    return reached


def wrong_libraries(root: Path) -> Iterator[str]:
    """Yield a line for every import of a library that a room may not use, and for every absolute import of a room."""
    for path in python_files(root, *ROOMS):
        for entry in imports(root, path):
            house, library = entry.source.split(".")[0], entry.target.split(".")[0]
            if entry.relative:
                continue
            allowed_rooms = LIBRARY_ROOMS.get(library)
            if library in (*ROOMS, "flash_diffusion") and library != "nodes":
                yield f"{entry}: imports inside the package are relative"
            elif house in ALWAYS and library not in ALWAYS[house] | set(sys.stdlib_module_names):
                yield f"{entry}: {house} imports only {', '.join(sorted(ALWAYS[house]))} and the standard library"
            elif library in NEVER.get(house, ()):
                yield f"{entry}: {house} never imports {library}"
            elif allowed_rooms and not any(f"{entry.source}.".startswith(f"{room}.") for room in allowed_rooms):
                yield f"{entry}: only {', '.join(allowed_rooms)} may"


def slow_imports(root: Path, start: str) -> Iterator[str]:
    """Yield a line for every slow library that is imported when a module is imported."""
    at_start: dict[str, list[Import]] = {}
    for path in python_files(root, *ROOMS):
        entries = [entry for entry in imports(root, path) if entry.when == "start"]
        at_start[module_name(root, path)] = entries
    arrows = {
        module: {name for entry in entries if entry.relative for name in with_packages(entry.target)}
        for module, entries in at_start.items()
    }
    for module in {start, *with_packages(start), *closure(arrows, start)}:
        for entry in at_start.get(module, ()):
            if not entry.relative and entry.target.split(".")[0] in SLOW:
                yield f"{entry}, and {start} imports {module}"


def with_packages(module: str) -> list[str]:
    """Return a module and the packages around it: Python imports them all."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def unsafe_loads(root: Path, folders: Sequence[str] = (*ROOMS, "scripts")) -> Iterator[str]:
    """Yield a line for every call that may unpickle a file."""
    for path in python_files(root, *folders):
        for node in ast.walk(parse(path)):
            loads = isinstance(node, ast.Call) and ast.unparse(node.func) in LOADS
            if loads and "weights_only=True" not in ast.unparse(node):
                yield f"{path.relative_to(root)}:{node.lineno} may unpickle: {ast.unparse(node)}"


def test_every_module_lies_in_a_room() -> None:
    assert_nothing(homeless_modules(ROOT))


def test_imports_lead_down() -> None:
    assert len(own_imports(ROOT)) > 500
    assert_nothing(wrong_arrows(ROOT))


def test_no_files_import_each_other_in_a_circle() -> None:
    assert_nothing(circles(ROOT))


def test_rooms_import_only_their_libraries() -> None:
    assert_nothing(wrong_libraries(ROOT))


def test_help_imports_no_slow_library() -> None:
    assert_nothing(slow_imports(ROOT, "trainer.cli"))


def test_no_file_is_unpickled() -> None:
    assert_nothing(unsafe_loads(ROOT))


BAD = {
    "a flat file in trainer": (homeless_modules, {"trainer/helpers.py": ""}, "trainer/helpers.py lies in no room"),
    "a flat file in nodes": (homeless_modules, {"nodes/utils.py": ""}, "nodes/utils.py lies in no room"),
    "a new room": (homeless_modules, {"nodes/video/node.py": ""}, "nodes/video/node.py lies in no room"),
    "an arrow up": (
        wrong_arrows,
        {"trainer/config.py": "", "trainer/files.py": "from .config import Recipe"},
        "trainer.files (line 1) imports trainer.config: trainer.config is not below trainer.files",
    ),
    "an arrow up in a function": (
        wrong_arrows,
        {"nodes/lora/loader.py": "", "nodes/shared/schema.py": "def f():\n    from ..lora import loader"},
        "nodes.shared.schema (line 2) imports nodes.lora.loader",
    ),
    "an arrow up for types": (
        wrong_arrows,
        {
            "trainer/tasks/base.py": "",
            "trainer/teachers/base.py": "if TYPE_CHECKING:\n    from ..tasks.base import Task",
        },
        "trainer.teachers.base (line 2) imports trainer.tasks.base",
    ),
    "an arrow to a neighbour": (
        wrong_arrows,
        {"nodes/control/match.py": "", "nodes/picture/upscale.py": "from ..control import match"},
        "nodes.control is not below nodes.picture",
    ),
    "from the trainer to the nodes": (
        wrong_arrows,
        {"nodes/shared/inputs.py": "", "trainer/cli.py": "from ..nodes.shared import inputs"},
        "trainer.cli (line 1) imports nodes.shared.inputs",
    ),
    "from the core to the trainer": (
        wrong_arrows,
        {"flash_core/grid.py": "from ..trainer.config import Recipe", "trainer/config.py": ""},
        "trainer.config is not below flash_core",
    ),
    "a circle in a room": (
        circles,
        {"trainer/data/a.py": "from . import b", "trainer/data/b.py": "def f():\n    from .a import g"},
        "trainer.data.a <-> trainer.data.b",
    ),
    "a circle for types": (
        circles,
        {
            "flash_core/a.py": "from .b import B",
            "flash_core/b.py": "from .c import C",
            "flash_core/c.py": "if TYPE_CHECKING:\n    from .a import A",
        },
        "flash_core.a <-> flash_core.b <-> flash_core.c",
    ),
    "numpy in the core": (wrong_libraries, {"flash_core/grid.py": "import numpy as np"}, "flash_core imports only"),
    "diffusers in a node": (
        wrong_libraries,
        {"nodes/lora/loader.py": "def f():\n    from diffusers.utils import logging"},
        "nodes never imports diffusers",
    ),
    "ComfyUI in the trainer": (wrong_libraries, {"trainer/cli.py": "import comfy.sd"}, "trainer never imports comfy"),
    "diffusers in the data": (
        wrong_libraries,
        {"trainer/data/order.py": "import diffusers"},
        "only trainer.teachers, trainer.demo.making, trainer.rehearse.pretend may",
    ),
    "an absolute import": (wrong_libraries, {"trainer/cli.py": "import flash_diffusion.nodes"}, "are relative"),
    "torch for --help": (
        lambda root: slow_imports(root, "trainer.cli"),
        {"trainer/cli.py": "from . import errors", "trainer/errors.py": "import torch"},
        "trainer.errors (line 1) imports torch, and trainer.cli imports trainer.errors",
    ),
    "torch of a package for --help": (
        lambda root: slow_imports(root, "trainer.cli"),
        {
            "trainer/cli.py": "from .demo.assets import PATH",
            "trainer/demo/assets.py": "",
            "trainer/demo/__init__.py": "import PIL.Image",
        },
        "trainer.demo (line 1) imports PIL.Image",
    ),
    "a pickle": (unsafe_loads, {"scripts/a.py": "torch.load(path, weights_only=False)"}, "scripts/a.py:1 may unpickle"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_checks_find(case: str, tmp_path: Path) -> None:
    check, files, finding = BAD[case]
    write(tmp_path, files)
    assert finding in lines(check(tmp_path))


def test_the_checks_accept_a_good_house(tmp_path: Path) -> None:
    good = {
        "flash_core/grid.py": "import torch\nfrom . import process",
        "flash_core/process.py": "import math",
        "nodes/shared/schema.py": "from comfy_api.latest import io\nfrom ...flash_core import grid",
        "nodes/lora/loader.py": "from ..shared.schema import INPUT",
        "trainer/errors.py": "",
        "trainer/cli.py": "import argparse\nfrom .errors import UserError\ndef main():\n    import torch",
        "trainer/teachers/base.py": "import diffusers\nfrom ...flash_core import grid",
        "trainer/teachers/families/sd.py": "from ..base import Teacher",
    }
    write(tmp_path, good)
    for check in (homeless_modules, wrong_arrows, circles, wrong_libraries, unsafe_loads):
        assert not lines(check(tmp_path))
    assert not lines(slow_imports(tmp_path, "trainer.cli"))
