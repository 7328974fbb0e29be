"""Fixtures around the real ComfyUI: the runtime's script as a module, a server for the session, a client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from .client import Client
from .inside_comfyui import forks_of
from .runtime import ROOT, load_runtime


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
    """Start a ComfyUI with this extension, for all tests of the session."""
    with runtime.serve(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def client(server: object) -> Iterator[Client]:
    """Open a new connection to the server."""
    with Client(server) as connected:
        yield connected
