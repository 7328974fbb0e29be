"""Go through ComfyUI's page as a user would, in both renderers, with a screenshot of each step.

    python scripts/page_sweep.py [--output out/page] [--only PATTERN]
    COMFYUI_PATH=/path/to/another/ComfyUI python scripts/page_sweep.py

Opens every template from the dialog, runs those of the demo, opens the help of every node, drops and runs every
blueprint, changes the language, runs app mode where the page has one, and distils: sees the preview change, interrupts,
goes on. Prints a line for each step, and ends with code 1 if one failed or the page reported an error of ours. Needs
the runtime (``comfy_runtime.py fetch``), playwright and Chromium; takes about ten minutes a renderer on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blueprints
import comfy_page
import comfy_runtime
import page_proofs
from playwright.sync_api import Error, Page

logger = logging.getLogger("page_sweep")

WORKFLOWS = sorted((comfy_runtime.ROOT / "workflows").glob("*.json"))
LOCALES = comfy_runtime.ROOT / "locales"
RENDERERS = {"classic": False, "vue": True}
SHORT = {"updates": 12, "trajectories": 8, "preview_every": 4}  # of a distillation: enough to see the preview change
HELP = sorted((comfy_runtime.ROOT / "web" / "docs").glob("*.md"))
TASKS = {"Flash Inpaint": "inpainting", "Flash Outpaint": "inpainting", "Flash Face Swap": "face-swap"}
LORAS = {"Flash Face Swap": "flash_demo_face_swap.safetensors"}
Step = tuple[str, Callable[[], None]]


def steps(page: Page, server: Any) -> Iterator[Step]:
    """Yield (name, work) of everything that a user does."""
    for path in WORKFLOWS:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        yield f"template {path.stem}", lambda workflow=workflow, name=path.stem: template(page, name, workflow)
    for path in HELP:
        yield f"help {path.stem}", lambda kind=path.stem: page_proofs.open_help_with_picture(page, kind)
    for title in blueprints.TABLE:
        yield f"blueprint {title}", lambda title=title: blueprint(page, title)
    if LOCALES.is_dir():
        translations = sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir() and folder.name != "en")
        # Neither page offers German. A page that is told a language which it does not offer breaks by itself.
        for locale in (one for one in translations if page_proofs.offers_language(page, one)):
            yield f"language {locale}", lambda locale=locale: language(page, server, locale)
    if page_proofs.has_app_mode(page):
        for name in ("flash_demo_text_to_image", "flash_demo_inpaint", "flash_demo_style"):
            yield f"app mode {name}", lambda name=name: app_mode(page, name)
    yield "distil", lambda: distil(page, server)


def workflow_of(name: str) -> dict[str, Any]:
    """Return a template in the page's format."""
    return json.loads((comfy_runtime.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def template(page: Page, name: str, workflow: dict[str, Any]) -> None:
    """Open a template from the dialog; run it if its models ship with this extension."""
    page_proofs.open_template(page, name, len(workflow["nodes"]))
    fit(page)
    if comfy_page.models(workflow):
        return
    for kind in ("FlashDistill", "FlashDistillHeadless"):
        page_proofs.set_values(page, kind, SHORT)
    page_proofs.run(page)
    page_proofs.wait_for_picture(page)
    page.wait_for_timeout(comfy_page.SETTLE)
    page_proofs.assert_no_overlap(page)


def blueprint(page: Page, title: str) -> None:
    """Drop a blueprint, connect it with the demo's models, run it."""
    page_proofs.new_workflow(page)
    page_proofs.drop_blueprint(page, title)
    page_proofs.assert_blueprint_has_its_template_values(page, title)
    page_proofs.set_values(page, "FlashDistill", SHORT)
    page_proofs.connect_blueprint(page, title, TASKS.get(title, "text-to-image"), LORAS.get(title))
    fit(page)
    page_proofs.run(page)
    page_proofs.wait_for_picture(page)


def language(page: Page, server: Any, locale: str) -> None:
    """Change the page's language; see a node's name, the menu and a tooltip in it.

    0.3.75's page drops the translations of extensions: there our names stay English, among translated ones.
    """
    names = json.loads((LOCALES / locale / "nodeDefs.json").read_text(encoding="utf-8"))["FlashSampler"]
    translated = page_proofs.has_app_mode(page)
    server.post("/settings", {"Comfy.Locale": locale})
    try:
        comfy_page.load(page, server)
        comfy_page.open_workflow(page, workflow_of("flash_demo_text_to_image"))
        wanted = names["display_name"] if translated else "Flash Sampler"
        page.wait_for_function(
            "wanted => window.app.graph.nodes.some(node => node.title === wanted)", arg=wanted, timeout=comfy_page.WAIT
        )
        if not translated:
            return
        page_proofs.hover_widget(page, "FlashSampler", "steps")
        page.get_by_text(names["inputs"]["steps"]["tooltip"][:12]).first.wait_for()
        shown = page_proofs.open_menu(page, "Flash Diffusion")
        assert "Flash Diffusion" in shown, shown
        assert "sampling" not in shown, "a branch of the menu is still English"
    finally:
        server.post("/settings", {"Comfy.Locale": "en"})


def app_mode(page: Page, name: str) -> None:
    """Run a template in app mode."""
    workflow = workflow_of(name)
    comfy_page.open_workflow(page, workflow)
    page_proofs.run_in_app_mode(page, len(workflow["extra"]["linearData"]["inputs"]))


def distil(page: Page, server: Any) -> None:
    """Distil: see two previews, interrupt, queue again, and see that it goes on."""
    comfy_page.load(page, server)
    comfy_page.open_workflow(page, workflow_of("flash_distill_demo"))
    fit(page)
    page_proofs.interrupt_and_resume(page, {**SHORT, "seed": int(time.time()) % 2**31})


def fit(page: Page) -> None:
    """Show the whole graph."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")


def sweep(server: Any, renderer: str, output: Path, only: str) -> int:
    """Make all steps in one renderer; return the number of failures."""
    failures = 0
    for path in WORKFLOWS:
        comfy_page.offer_models(server, json.loads(path.read_text(encoding="utf-8")))
    server.post("/settings", {"Comfy.VueNodes.Enabled": RENDERERS[renderer]})
    with (
        tempfile.TemporaryDirectory() as profile,
        comfy_page.open_page(server, Path(profile) / "chromium") as page,
        page_proofs.collect_errors(page) as errors,
    ):
        for name, work in steps(page, server):
            if not re.search(only, name):
                continue
            begin = time.monotonic()
            try:
                work()
                result = "ok"
            except (AssertionError, Error) as error:
                failures += 1
                result = f"FAILED: {str(error).splitlines()[0]}"
            page.wait_for_timeout(comfy_page.SETTLE)
            page.screenshot(path=str(output / f"{renderer} {name}.png"))
            logger.info("%s, %s: %s (%.0f s)", renderer, name, result, time.monotonic() - begin)
            if result != "ok" or name.startswith(("help", "app mode", "language")):
                comfy_page.load(page, server)
        for error in filter(page_proofs.is_ours, errors):
            failures += 1
            logger.info("%s: error in the page: %s", renderer, error)
    return failures


def main() -> int:
    """Sweep; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description="Go through ComfyUI's page as a user would.")
    parser.add_argument("--output", type=Path, default=comfy_runtime.ROOT / "out" / "page", help="for screenshots")
    parser.add_argument("--only", default="", help="only steps whose name has this regular expression")
    parser.add_argument("--renderer", choices=RENDERERS, help="only this renderer (default: both)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, comfy_runtime.serve(Path(scratch) / "base") as server:
        renderers = [arguments.renderer] if arguments.renderer else list(RENDERERS)
        failures = sum(sweep(server, renderer, arguments.output, arguments.only) for renderer in renderers)
    logger.info("%s", f"{failures} failed" if failures else "all worked")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
