"""App mode and blueprints: what they name exists, blueprints are up to date, and ComfyUI lists them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .client import Client
from .runtime import ROOT, load_script
from .test_workflows import NAMES, api, interface, widgets

pytestmark = pytest.mark.comfy

blueprints = load_script("blueprints")


def widget_names(info: dict[str, Any]) -> set[str]:
    """Return the inputs of a node that a user sees."""
    return {name for kind, section in info["input"].items() if kind != "hidden" for name in section}


def is_advanced(info: dict[str, Any], name: str) -> bool:
    """Return whether an input is folded by the page's new renderer, which hides it on a blueprint altogether."""
    sections = [section for kind, section in info["input"].items() if kind != "hidden"]
    ((_, *options),) = [section[name] for section in sections if name in section]
    return bool(options and options[0].get("advanced"))


@pytest.mark.parametrize("name", NAMES)
def test_app_mode_names_widgets_and_outputs_that_exist(client: Client, name: str) -> None:
    workflow, queued, nodes = interface(name), api(name), client.object_info()
    kinds = {node["id"]: node["type"] for node in workflow["nodes"]}
    shown = workflow["extra"]["linearData"]
    assert 3 <= len(shown["inputs"]) <= 6
    for node, widget, *_ in shown["inputs"]:
        # A widget's value is in the prompt, and is no link.
        assert not isinstance(queued[str(node)]["inputs"][widget], list), (node, widget)
        assert not is_advanced(nodes[kinds[node]], widget), (node, widget)
    assert len({(node, widget) for node, widget, *_ in shown["inputs"]}) == len(shown["inputs"])
    # The form shows a widget's name and our description: two prompts would look the same without one.
    said = [(widget, *(options["description"] for options in more)) for _, widget, *more in shown["inputs"]]
    assert len(set(said)) == len(said), said
    assert shown["outputs"]
    assert all(nodes[kinds[node]]["output_node"] for node in shown["outputs"])
    saves = [identity for identity, kind in kinds.items() if kind == "SaveImage"]
    assert set(saves) <= set(shown["outputs"])
    assert shown["outputs"][0] == saves[0]


def test_files_are_those_that_the_templates_give() -> None:
    assert {path.stem for path in (ROOT / "subgraphs").iterdir()} == set(blueprints.TABLE)
    for title in blueprints.TABLE:
        kept = (ROOT / "subgraphs" / f"{title}.json").read_text(encoding="utf-8")
        assert kept == blueprints.text_of(title), f"run scripts/blueprints.py: {title} is older than its template"


@pytest.mark.parametrize("title", blueprints.TABLE)
def test_a_blueprint_is_listed_and_whole(client: Client, title: str) -> None:
    listed = json.loads(client.server.get("/global_subgraphs"))
    (identity,) = (key for key, entry in listed.items() if entry["name"] == title)
    served = json.loads(json.loads(client.server.get(f"/global_subgraphs/{identity}"))["data"])
    (node,) = served["nodes"]
    (graph,) = served["definitions"]["subgraphs"]
    assert node["type"] == graph["id"]

    nodes = client.object_info()
    assert title not in {info["display_name"] for info in nodes.values()}, "the search would list two of this name"
    inside = {one["id"]: one for one in graph["nodes"]}
    for link in graph["links"]:
        origin, target = inside.get(link["origin_id"]), inside.get(link["target_id"])
        if origin is None:
            given = graph["inputs"][link["origin_slot"]]
            assert link["id"] in given["linkIds"]
            assert given["type"] == link["type"]
        else:
            assert nodes[origin["type"]]["output"][link["origin_slot"]] == link["type"]
            assert link["id"] in origin["outputs"][link["origin_slot"]]["links"]
        if target is None:
            assert link["id"] in graph["outputs"][link["target_slot"]]["linkIds"]
        else:
            slot = target["inputs"][link["target_slot"]]
            assert (slot["link"], slot["type"]) == (link["id"], link["type"])
            assert slot["name"] in widget_names(nodes[target["type"]])
            assert not is_advanced(nodes[target["type"]], slot["name"]), (target["type"], slot["name"])
    # No required socket is left open: it could not run.
    for one in inside.values():
        required = nodes[one["type"]]["input"].get("required", {})
        for slot in one["inputs"]:
            assert slot["link"] is not None or slot["name"] not in required or "widget" in slot, (
                one["type"],
                slot["name"],
            )
    # Older pages give the first listed widget the node's first value, the second the second.
    for one in inside.values():
        listed = [slot["name"] for slot in one["inputs"] if "widget" in slot]
        assert listed == [name for name, _ in widgets(nodes[one["type"]])][: len(listed)], one["type"]
    assert [slot["name"] for slot in node["inputs"]] == [slot["name"] for slot in graph["inputs"]]
