"""Fixtures around the real ComfyUI: the runtime's script as a module, a server for the session, a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from .client import Client
from .inside_comfyui import forks_of
from .runtime import ROOT, load_runtime

FAILING = Path(__file__).resolve().parent / "stand_ins" / "failing_pack"


@pytest.fixture(scope="session")
def root() -> Path:
    """The root folder of the clone."""
    return ROOT


@pytest.fixture(scope="session")
def runtime() -> Iterator[ModuleType]:
    """Import ``scripts/comfy_runtime.py``; fail with its message if there is no ComfyUI."""
    module = load_runtime()
    module.comfyui_folder()
    yield module
    forks_of(module).stop()


@pytest.fixture(scope="session")
def server(runtime: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Start a ComfyUI with this extension and a node that fails, for all tests of the session."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "failing").symlink_to(FAILING, target_is_directory=True)
    with runtime.serve(base) as running:
        yield running


@pytest.fixture
def client(server: object) -> Iterator[Client]:
    """Open a new connection to the server."""
    with Client(server) as connected:
        yield connected
