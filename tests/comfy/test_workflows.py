"""The shipped workflows: valid, the same in both formats, listed as templates, and they run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from . import prompts
from .client import Client

pytestmark = pytest.mark.comfy

NAMES = sorted(path.stem for path in (prompts.ROOT / "workflows").glob("*.json"))
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
FRONT_END_NODES = {"MarkdownNote", "Note"}


def interface(name: str) -> dict[str, Any]:
    return json.loads((prompts.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    return json.loads((prompts.SHIPPED.parent / f"{name}.json").read_text(encoding="utf-8"))


def widgets(info: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A node's widgets in the page's order, from what the server says of it."""
    found = []
    for section in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(section, {}).items():
            if isinstance(kind, list) or kind in WIDGET_TYPES:
                found.append((name, options[0] if options else {}))
    return found


def to_api(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """What the page would queue for a workflow that it saved."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONT_END_NODES:
            continue
        values = iter(node["widgets_values"])
        inputs = {}
        for name, options in widgets(nodes[node["type"]]):
            inputs[name] = next(values)
            if options.get("control_after_generate"):
                assert next(values) in ("fixed", "increment", "decrement", "randomize")
        assert not list(values), f"node {node['id']} has more widget values than widgets"
        for slot in node["inputs"]:
            if slot["link"] is not None:
                _, origin, origin_slot, *_ = links[slot["link"]]
                inputs[slot["name"]] = [str(origin), origin_slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_say_the_same(client: Client, name: str) -> None:
    assert to_api(interface(name), client.object_info()) == api(name)


@pytest.mark.parametrize("name", NAMES)
def test_links_join_outputs_and_inputs_of_one_type(client: Client, name: str) -> None:
    workflow, nodes = interface(name), client.object_info()
    by_id = {node["id"]: node for node in workflow["nodes"]}
    assert len(by_id) == len(workflow["nodes"])
    for identity, origin, origin_slot, target, target_slot, kind in workflow["links"]:
        assert nodes[by_id[origin]["type"]]["output"][origin_slot] == kind
        source, sink = by_id[origin]["outputs"][origin_slot], by_id[target]["inputs"][target_slot]
        assert identity in source["links"]
        assert (sink["link"], source["type"], sink["type"]) == (identity, kind, kind)


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap(name: str) -> None:
    title = 30  # the title bar lies above a node's position
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in interface(name)["nodes"]]
    for index, (x, y, width, height, kind) in enumerate(boxes):
        for other_x, other_y, other_width, other_height, other in boxes[index + 1 :]:
            apart = x + width <= other_x or other_x + other_width <= x
            apart = apart or y + height <= other_y - title or other_y + other_height <= y - title
            assert apart, f"{kind} and {other} overlap"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_listed_as_a_template_with_a_thumbnail(server, name: str) -> None:
    assert name in json.loads(server.get("/api/workflow_templates"))["flash-diffusion"]
    served = json.loads(server.get(f"/api/workflow_templates/flash-diffusion/{name}.json"))
    assert served == interface(name)
    thumbnail = Image.open(io.BytesIO(server.get(f"/api/workflow_templates/flash-diffusion/{name}.jpg")))
    assert min(thumbnail.size) >= 256


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_the_second_run_is_cached(client: Client, name: str) -> None:
    first = client.run(api(name))
    assert first.succeeded, first.error
    assert set(first.executed) | set(first.cached) == set(api(name))
    assert prompts.SAMPLER in first.executed
    pictures = client.images(first, prompts.SAVE)
    assert len(pictures) == api(name)[prompts.EMPTY]["inputs"]["batch_size"]
    assert all(picture.size == (128, 128) for picture in pictures)
    again = client.run(api(name))
    assert again.succeeded, again.error
    assert not again.executed
    assert set(again.cached) == set(api(name))


def test_every_workflow_has_its_twin() -> None:
    assert sorted(path.stem for path in prompts.SHIPPED.parent.glob("*.json")) == NAMES
    assert sorted(path.stem for path in Path(prompts.ROOT / "workflows").glob("*.jpg")) == NAMES
