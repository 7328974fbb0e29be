"""Test ComfyUI's page in Chromium: templates are listed, open, run or offer downloads, without an error of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from ..comfy.runtime import ROOT, load_runtime, load_script

NAME = "flash_demo_text_to_image"
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
PUBLISHED = [name for name in WORKFLOWS if not name.startswith("flash_demo_")]
DOWNLOADS = ("flash_pixart", "flash_sd15")  # one of several loaders, one of a checkpoint
PRIMITIVE = "PrimitiveNode"  # of the page alone: the server never sees it
ARTIFACTS = ROOT / "out" / "test-artifacts"

comfy_page = load_script("comfy_page")
load_script("blueprints")  # for the next one
page_proofs = load_script("page_proofs")
WAIT = comfy_page.WAIT
is_ours = page_proofs.is_ours

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
    pytest.mark.skipif(
        comfy_page.CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a ComfyUI with this extension."""
    with load_runtime().serve(tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Start one Chromium for all tests."""
    with comfy_page.open_page(server, tmp_path_factory.mktemp("chromium") / "profile") as opened:
        yield opened


@pytest.fixture
def page(chromium: Page, server: Any) -> Iterator[Page]:
    """Open a new tab, without what the last test left open: leaving a changed workflow may ask for a confirmation."""
    opened = chromium.context.new_page()
    comfy_page.load(opened, server)
    yield opened
    opened.close()


@pytest.fixture
def errors(page: Page) -> Iterator[list[str]]:
    """Collect the page's errors."""
    with page_proofs.collect_errors(page) as seen:
        yield seen


def workflow_file(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def assert_page_queues_api_twin(page: Page, name: str) -> None:
    """Check that the page queues the workflow that tests/comfy/workflows holds in API format."""
    queued = page.evaluate("window.app.graphToPrompt().then(prompt => prompt.output)")
    twin = json.loads((ROOT / "tests" / "comfy" / "workflows" / f"{name}.json").read_text())
    for node in queued.values():
        if node["class_type"] == "PreviewAny":  # its text is a widget of the page, unknown to the server
            node["inputs"] = {"source": node["inputs"]["source"]}
    assert {key: (node["class_type"], node["inputs"]) for key, node in queued.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in twin.items()
    }


def test_demo_template_opens_and_runs(page: Page, errors: list[str]) -> None:
    page_proofs.open_template(page, NAME, len(workflow_file(NAME)["nodes"]))
    types = page.evaluate("window.app.graph.nodes.map(node => node.type)")
    assert sorted(types) == sorted(node["type"] for node in workflow_file(NAME)["nodes"])
    assert_page_queues_api_twin(page, NAME)

    page.evaluate("window.app.queuePrompt(0)")
    page.wait_for_function(
        "window.app.graph.nodes.find(node => node.type === 'SaveImage')?.imgs?.length > 0", timeout=WAIT
    )
    page.evaluate("window.app.canvas.ds.reset?.(); window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1500)
    page_proofs.assert_no_overlap(page)
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(ARTIFACTS / "workflow.png"))
    assert not [error for error in errors if is_ours(error)], errors


def test_loader_shows_its_card_and_saves_none_of_it(page: Page, errors: list[str]) -> None:
    workflow = workflow_file(NAME)
    comfy_page.open_workflow(page, workflow)
    page_proofs.set_values(page, "FlashLoraLoader", {"strength": 0.95})  # else it may be cached, and tells nothing
    page_proofs.run(page)
    card = page_proofs.panel_text(page, "flash_card")
    assert "rank 32, scale 1, strength 0.95" in card
    assert "124 of 124" in card
    saved = page.evaluate("window.app.graph.serialize().nodes.find(node => node.type === 'FlashLoraLoader')")
    assert saved["widgets_values"] == ["flash_demo.safetensors", 0.95, False]
    queued = page.evaluate("window.app.graphToPrompt().then(prompt => prompt.output)")
    loader = next(node for node in queued.values() if node["class_type"] == "FlashLoraLoader")
    assert set(loader["inputs"]) == {"model", "lora_name", "strength", "allow_partial"}
    assert not [error for error in errors if is_ours(error)], errors


ODD_OUTPUTS = (
    "undefined",
    "null",
    "{}",
    "{ flash_card: 7 }",
    "{ flash_card: [7] }",
    "{ flash_losses: [] }",
    "{ flash_losses: ['x', null] }",
)


def test_odd_outputs_are_no_error_and_texts_no_html(page: Page, errors: list[str]) -> None:
    """A later server may send what this page does not know, and a LoRA's header may hold anything."""
    comfy_page.open_workflow(page, workflow_file(NAME))
    ours = "window.app.graph.nodes.filter(node => /^Flash/.test(node.type))"
    for output in ODD_OUTPUTS:
        page.evaluate(f"{ours}.forEach(node => node.onExecuted({output}))")
    page.evaluate(
        f"""{ours}.find(node => node.type === 'FlashLoraLoader').onExecuted(
            {{ flash_card: [['<b>made</b> for', '<img src=x onerror="window.broken = true">']] }})"""
    )
    assert '<img src=x onerror="window.broken = true">' in page_proofs.panel_text(page, "flash_card")
    assert page.evaluate("window.broken") is None
    assert not [error for error in errors if is_ours(error)], errors


def test_help_opens_with_its_picture(page: Page, errors: list[str]) -> None:
    page_proofs.open_help_with_picture(page, "FlashLoraLoader")
    assert not [error for error in errors if is_ours(error)], errors


def test_blueprint_is_dropped_and_runs(page: Page, errors: list[str]) -> None:
    title = "Flash Outpaint"  # shows widgets that are not the first ones of their node
    page_proofs.new_workflow(page)
    page_proofs.drop_blueprint(page, title)
    page_proofs.assert_blueprint_has_its_template_values(page, title)
    page_proofs.connect_blueprint(page, title, "inpainting")
    page_proofs.run(page)
    page_proofs.wait_for_picture(page)
    assert not [error for error in errors if is_ours(error)], errors


def test_template_runs_in_app_mode(page: Page, errors: list[str]) -> None:
    if not page_proofs.has_app_mode(page):
        pytest.skip("this ComfyUI has no app mode: it came after 0.3.75")
    workflow = workflow_file(NAME)
    comfy_page.open_workflow(page, workflow)
    page_proofs.run_in_app_mode(page, len(workflow["extra"]["linearData"]["inputs"]))
    page_proofs.leave_app_mode(page)
    assert not [error for error in errors if is_ours(error)], errors


@pytest.mark.slow
def test_distillation_is_watched_interrupted_and_resumed(page: Page, errors: list[str]) -> None:
    comfy_page.open_workflow(page, workflow_file("flash_distill_demo"))
    page_proofs.interrupt_and_resume(page, {"updates": 8, "trajectories": 4, "samples": 2, "preview_every": 2})
    page.screenshot(path=str(ARTIFACTS / "flash_distill.png"))
    assert not [error for error in errors if is_ours(error)], errors


def old_workflow(source: str | None) -> dict[str, Any]:
    """Return the demo's workflow as version 0.1 saved it: stochasticity is the number .5, or linked to another node.

    Version 0.1 had no preset behind it.

    Args:
        source: the class of the linked node, which gives .25; None for no link.
    """
    workflow = workflow_file(NAME)
    sampler = next(node for node in workflow["nodes"] if node["type"] == "FlashSampler")
    *before, stochasticity, preset = sampler["widgets_values"]
    assert [stochasticity, preset] == ["auto", "auto"]
    sampler["widgets_values"] = [*before, 0.5]
    if source is not None:
        widget = {"name": "stochasticity"}
        sampler["inputs"].append({"name": "stochasticity", "type": "FLOAT", "widget": widget, "link": 99})
        output = {"name": "FLOAT", "type": "FLOAT", "links": [99]} | ({"widget": widget} if source == PRIMITIVE else {})
        workflow["nodes"].append(
            {
                "id": 99,
                "type": source,
                "pos": [40, 40],
                "size": [240, 58],
                "flags": {},
                "order": 0,
                "mode": 0,
                "inputs": [],
                "outputs": [output],
                "properties": {},
                "widgets_values": [0.25, "fixed"] if source == PRIMITIVE else [0.25],
            }
        )
        workflow["links"].append([99, 99, 0, sampler["id"], len(sampler["inputs"]) - 1, "FLOAT"])
        workflow["last_node_id"] = workflow["last_link_id"] = 99
    return workflow


def test_stochasticity_of_old_and_new_workflows_in_the_page(page: Page, errors: list[str]) -> None:
    queued = "window.app.graphToPrompt().then(prompt => prompt.output)"
    for source, expected in ((None, 0.5), (PRIMITIVE, 0.25), ("PrimitiveFloat", ["99", 0])):
        comfy_page.open_workflow(page, old_workflow(source))
        sampler = next(node for node in page.evaluate(queued).values() if node["class_type"] == "FlashSampler")
        found = sampler["inputs"]["stochasticity"]
        assert (found if isinstance(found, list) else float(found)) == expected, source
        assert sampler["inputs"]["preset"] == "auto"
    page.evaluate("window.app.queuePrompt(0)")
    page.wait_for_function(
        "window.app.graph.nodes.find(node => node.type === 'SaveImage')?.imgs?.length > 0", timeout=WAIT
    )
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(ARTIFACTS / "stochasticity_linked.png"))
    comfy_page.open_workflow(page, workflow_file(NAME))
    sampler = "window.app.graph.nodes.find(node => node.type === 'FlashSampler')"
    widget = f"{sampler}.widgets.find(widget => widget.name === 'stochasticity')"
    assert page.evaluate(f"[{widget}.type, {widget}.value]") == ["text", "auto"]
    assert not [error for error in errors if is_ours(error)], errors


@pytest.mark.slow
def test_page_offers_published_models_and_opens_every_workflow(page: Page, server: Any, errors: list[str]) -> None:
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    one_a_file = page.get_by_role("button", name=re.compile(r"^Download (\(.*\)|\S+\.safetensors)$"))
    for name in DOWNLOADS:
        comfy_page.load(page, server)  # without what the last workflow left open
        comfy_page.open_workflow(page, workflow_file(name))
        details = page.get_by_text("View details")  # newer pages list the files in a side bar
        details.or_(one_a_file).first.wait_for(timeout=WAIT)
        if details.count():
            details.first.click()
        expect(one_a_file).to_have_count(len(comfy_page.models(workflow_file(name))), timeout=WAIT)
        page.screenshot(path=str(ARTIFACTS / f"{name}_downloads.png"))

    for name in PUBLISHED:
        comfy_page.offer_models(server, workflow_file(name))
    comfy_page.load(page, server)
    for name in WORKFLOWS:
        comfy_page.open_workflow(page, workflow_file(name))
        page.screenshot(path=str(ARTIFACTS / f"{name}.png"))
        assert not page.evaluate("window.app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")
        assert not page.evaluate(
            "window.app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types))"
        )
        assert one_a_file.count() == 0
        assert_page_queues_api_twin(page, name)
    assert not [error for error in errors if is_ours(error)], errors
