"""Make the thumbnails of the templates: one JPEG beside each shipped workflow.

    python scripts/thumbnails.py [NAME ...]

NAME is a workflow's name without ``.json`` (default: all workflows). A workflow of the demo is run: its thumbnail shows
its pictures. A workflow of published models, whose files are gigabytes, is not run: its thumbnail shows its graph in
ComfyUI's page. Needs the runtime (``comfy_runtime.py fetch``), playwright and Chromium. Run it after a workflow or the
demo's LoRA has changed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import comfy_page
import comfy_runtime
from PIL import Image, ImageOps

logger = logging.getLogger("thumbnails")

WORKFLOWS = comfy_runtime.ROOT / "workflows"
QUEUED = comfy_runtime.ROOT / "tests" / "comfy" / "workflows"  # the same workflows in API format
SIDE = 512  # pixels of a contact sheet
REPORTS = ("FlashDistill", "FlashDistillHeadless")
GRAPH_WIDTH = 900  # pixels of a graph's picture


def contact_sheet(pictures: list[Path]) -> Image.Image:
    """Return the pictures in a grid ``SIDE`` pixels wide: square tiles, each picture whole on white."""
    columns = math.ceil(math.sqrt(len(pictures)))
    tile = SIDE // columns
    sheet = Image.new("RGB", (SIDE, math.ceil(len(pictures) / columns) * tile), "white")
    for index, path in enumerate(pictures):
        picture = ImageOps.pad(Image.open(path).convert("RGB"), (tile, tile), Image.Resampling.LANCZOS, "white")
        sheet.paste(picture, (index % columns * tile, index // columns * tile))
    return sheet


def report_alone(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow that saves only the report of a node of :data:`REPORTS`; any other workflow as it is.

    Beside single pictures a report would be too small to be read.
    """
    reports = {key for key, node in prompt.items() if node["class_type"] in REPORTS}
    if not reports:
        return prompt
    return {
        key: node
        for key, node in prompt.items()
        if node["class_type"] != "SaveImage" or node["inputs"]["images"][0] in reports
    }


def graphs(server: Any, workflows: list[Path], profile: Path) -> list[Image.Image]:
    """Return pictures of the workflows' graphs, ``GRAPH_WIDTH`` pixels wide."""
    opened = [json.loads(path.read_text(encoding="utf-8")) for path in workflows]
    for workflow in opened:
        comfy_page.offer_models(server, workflow)
    with comfy_page.open_page(server, profile, width=2700, height=1600) as page:
        pictures = []
        for workflow in opened:
            comfy_page.open_workflow(page, workflow)
            picture = comfy_page.graph_picture(page, workflow)
            size = (GRAPH_WIDTH, round(picture.height * GRAPH_WIDTH / picture.width))
            pictures.append(picture.resize(size, Image.Resampling.LANCZOS))
    return pictures


def main() -> int:
    """Write ``workflows/*.jpg``; return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = argparse.ArgumentParser(description="Make the templates' thumbnails.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of workflows without .json (default: all)")
    names = parser.parse_args().names or ["*"]
    workflows = sorted(path for name in names for path in WORKFLOWS.glob(f"{name}.json"))
    if len(workflows) < len(names):
        parser.error(f"{WORKFLOWS} does not have all of {', '.join(names)}. Leave out .json in names.")
    published = [path for path in workflows if comfy_page.models(json.loads(path.read_text(encoding="utf-8")))]
    with tempfile.TemporaryDirectory() as scratch, comfy_runtime.serve(Path(scratch) / "base") as server:
        drawn = graphs(server, published, Path(scratch) / "profile") if published else []
        thumbnails = dict(zip(published, drawn, strict=True))
        for workflow in workflows:
            if workflow not in thumbnails:
                prompt = report_alone(json.loads((QUEUED / workflow.name).read_text()))
                pictures = comfy_runtime.run_workflow(server, prompt, Path(scratch) / workflow.stem)
                thumbnails[workflow] = contact_sheet(pictures)
            thumbnail = workflow.with_suffix(".jpg")
            thumbnails[workflow].save(thumbnail, quality=90)
            logger.info("%s", thumbnail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
