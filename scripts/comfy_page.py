"""Drive ComfyUI's page in a headless Chromium: for the tests of the page and for the thumbnails of the templates.

Needs playwright and a Chromium (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

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
    "Comfy.Window.UnloadConfirmation": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
WAIT = 300_000  # milliseconds; a busy machine takes minutes for what takes seconds elsewhere
SETTLE = 1500  # milliseconds in which the page draws what changed
TITLE = 30  # pixels that a node's title bar takes above its position
INSET = 200  # pixels of the page's left and top edges that its bars may cover


@contextmanager
def open_page(server: Any, profile: Path, width: int = 1600, height: int = 900) -> Iterator[Page]:
    """Open the page of a running ComfyUI in a new Chromium, without the dialogs of a first start.

    Args:
        server: a ``comfy_runtime.Server``.
        profile: a new folder for Chromium's profile.
        width, height: of the page, in pixels.
    """
    server.post("/settings", SETTINGS)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=CHROMIUM,
            headless=True,
            args=ARGUMENTS,
            viewport={"width": width, "height": height},
            timeout=WAIT,
        )
        context.set_default_timeout(WAIT)
        # Leaving a changed workflow may ask for a confirmation, and without an answer the page never loads again.
        context.on("dialog", lambda dialog: dialog.accept())
        page = context.new_page()
        load(page, server)
        yield page
        context.close()


def load(page: Page, server: Any) -> None:
    """Load the page and wait until it is ready."""
    page.goto(server.address, timeout=WAIT, wait_until="domcontentloaded")
    page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=WAIT)


def models(workflow: dict[str, Any]) -> list[dict[str, str]]:
    """Return the files that a workflow (UI format) offers for download, each with ``name``, ``url``, ``directory``."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", ())]


def offer_models(server: Any, workflow: dict[str, Any]) -> None:
    """Make an empty file for each of :func:`models` in the server's folders, so that the page misses no file."""
    for model in models(workflow):
        file = server.base / "models" / model["directory"] / model["name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def open_workflow(page: Page, workflow: dict[str, Any]) -> None:
    """Open a workflow (UI format) in the page and wait until it is drawn."""
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    page.wait_for_function("count => window.app.graph.nodes.length === count", arg=len(workflow["nodes"]), timeout=WAIT)
    page.wait_for_timeout(SETTLE)


def graph_picture(page: Page, workflow: dict[str, Any], margin: int = 20) -> Image.Image:
    """Return a picture of the open workflow's nodes, without its notes, at scale 1.

    The page must be larger than the graph with the page's tabs and side bar.
    """
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
    left, top = min(box[0] for box in boxes) - margin, min(box[1] for box in boxes) - TITLE - margin
    right, bottom = max(x + w for x, _, w, _ in boxes) + margin, max(y + h for _, y, _, h in boxes) + margin
    x, y = page.evaluate(
        """([left, top, inset]) => {
            const { canvas } = window.app;
            canvas.ds.scale = 1;
            canvas.ds.offset = [inset - left, inset - top];
            canvas.setDirty(true, true);
            const box = canvas.canvas.getBoundingClientRect();
            return [box.x + inset, box.y + inset];
        }""",
        [left, top, INSET],
    )
    page.wait_for_timeout(SETTLE)
    clip = {"x": x, "y": y, "width": right - left, "height": bottom - top}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
