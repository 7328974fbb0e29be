"""Make the templates' thumbnails: run every shipped workflow in ComfyUI and write its pictures beside it as one JPEG.

    python scripts/thumbnails.py

Needs the runtime (``comfy_runtime.py fetch``) and the demo's LoRA; run it after a workflow or the LoRA has changed.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from pathlib import Path

import comfy_runtime
from PIL import Image

logger = logging.getLogger("thumbnails")

WORKFLOWS = comfy_runtime.ROOT / "workflows"
QUEUED = comfy_runtime.ROOT / "tests" / "comfy" / "workflows"  # the same workflows in API format
SIDE = 512  # pixels


def contact_sheet(pictures: list[Path]) -> Image.Image:
    """The pictures in a square grid of ``SIDE`` pixels."""
    columns = math.ceil(math.sqrt(len(pictures)))
    tile = SIDE // columns
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    for index, path in enumerate(pictures):
        picture = Image.open(path).convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
        sheet.paste(picture, (index % columns * tile, index // columns * tile))
    return sheet


def main() -> int:
    """Write ``workflows/*.jpg``; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with tempfile.TemporaryDirectory() as scratch, comfy_runtime.serve(Path(scratch) / "base") as server:
        for workflow in sorted(WORKFLOWS.glob("*.json")):
            prompt = json.loads((QUEUED / workflow.name).read_text())
            pictures = comfy_runtime.run_workflow(server, prompt, Path(scratch) / workflow.stem)
            thumbnail = workflow.with_suffix(".jpg")
            contact_sheet(pictures).save(thumbnail, quality=90)
            logger.info("%s", thumbnail)
    return 0


if __name__ == "__main__":
    sys.exit(main())
