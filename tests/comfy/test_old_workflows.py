"""Workflows that users saved with version 0.1 still fit the nodes: every node, input and value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .client import Client
from .runtime import ROOT

pytestmark = pytest.mark.comfy

WORKFLOWS = json.loads((ROOT / "tests" / "files" / "workflows.json").read_text(encoding="utf-8"))


def flaws(node: dict[str, Any], info: dict[str, Any]) -> Iterator[str]:
    """Yield what ComfyUI would refuse of one node of a saved workflow."""
    known = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    given = node["inputs"]
    for name in info["input"].get("required", {}):
        if name not in given:
            yield f"{name} is required"
    for name, value in given.items():
        # Inputs that grow with others are named "group.input".
        if name not in known and name.split(".")[0] not in known:
            yield f"{name} is unknown"
            continue
        kind, *options = known.get(name, (None,))
        if isinstance(value, list) or kind is None:
            continue
        limits = options[0] if options else {}
        choices = kind if isinstance(kind, list) else limits.get("options")
        if choices is not None:
            if value not in choices and "." not in str(value):  # files are the user's own
                yield f"{name}: {value!r} is none of {choices}"
        elif kind in ("INT", "FLOAT") and not limits["min"] <= value <= limits["max"]:
            yield f"{name}: {value} is not in {limits['min']}..{limits['max']}"


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_an_old_workflow_fits_the_nodes(name: str, client: Client) -> None:
    nodes = client.object_info()
    ours = [node for node in WORKFLOWS[name].values() if node["class_type"].startswith("Flash")]
    assert ours
    for node in ours:
        assert node["class_type"] in nodes
        assert not list(flaws(node, nodes[node["class_type"]])), node["class_type"]


def test_a_flaw_is_found() -> None:
    info = {"input": {"required": {"steps": ["INT", {"min": 1, "max": 8}], "grid": [["trained"], {}], "model": ["X"]}}}
    node = {"inputs": {"steps": 9, "grid": "none", "seed": 1}}
    assert len(list(flaws(node, info))) == 4
