"""Settings of every test."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Busy machines make single examples slow; a deadline would only make tests flaky.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first, so that no process works on one alone at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep encoded data out of the user's cache; the tests share one, in their processes too."""
    os.environ["FLASH_DIFFUSION_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Results do not depend on the machine, and two threads beside ComfyUI's would stall each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _denormals_are_kept() -> Iterator[None]:
    """Training commands flush denormals for the whole process; the next test must not inherit that."""
    yield
    torch.set_flush_denormal(False)
