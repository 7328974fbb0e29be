"""ComfyUI's page in Chromium: the template is listed, opens, runs, its picture appears, no error is ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import ConsoleMessage, Page, sync_playwright

from ..comfy.runtime import ROOT, load_runtime

NAME = "flash_demo_text_to_image"
ARTIFACTS = ROOT / "out" / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Without these a welcome dialog covers the canvas.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.Persist": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
WAIT = 120_000  # milliseconds; CI's machines are slow

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A ComfyUI with this extension and without the first-start dialogs."""
    with load_runtime().serve(tmp_path_factory.mktemp("comfyui")) as running:
        running.post("/settings", SETTINGS)
        yield running


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A page of a fresh Chromium."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=ARGUMENTS,
            viewport={"width": 1600, "height": 900},
        )
        yield context.new_page()
        context.close()


def is_ours(message: str) -> bool:
    """Whether a console error concerns this extension: the page reports files of its own that are not there, and that
    it may not ask the registry on the internet about the nodes it shows.
    """
    return "flash" in message.lower() and "https://api.comfy.org/" not in message


def test_the_template_opens_and_runs_in_the_page(page: Page, server: Any) -> None:
    errors: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(f"{message.text} ({message.location.get('url', '')})")

    page.on("console", note)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.address)
    page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=WAIT)

    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("flash-diffusion", exact=True).first.click(timeout=WAIT)
    card = page.get_by_text(NAME).first
    card.wait_for(timeout=WAIT)
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(ARTIFACTS / "templates.png"))
    card.click()

    page.wait_for_function("window.app.graph.nodes.some(node => node.type === 'FlashSampler')", timeout=WAIT)
    workflow = json.loads((ROOT / "workflows" / f"{NAME}.json").read_text(encoding="utf-8"))
    types = page.evaluate("window.app.graph.nodes.map(node => node.type)")
    assert sorted(types) == sorted(node["type"] for node in workflow["nodes"])
    queued = page.evaluate("window.app.graphToPrompt().then(prompt => prompt.output)")
    twin = json.loads((ROOT / "tests" / "comfy" / "workflows" / f"{NAME}.json").read_text())
    assert {key: (node["class_type"], node["inputs"]) for key, node in queued.items()} == {
        key: (node["class_type"], node["inputs"]) for key, node in twin.items()
    }

    page.evaluate("window.app.queuePrompt(0)")
    page.wait_for_function(
        "window.app.graph.nodes.find(node => node.type === 'SaveImage')?.imgs?.length > 0", timeout=WAIT
    )
    page.evaluate("window.app.canvas.ds.reset?.(); window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1500)
    page.screenshot(path=str(ARTIFACTS / "workflow.png"))
    assert not [error for error in errors if is_ours(error)], errors
