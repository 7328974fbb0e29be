"""Make the README's picture from an evaluation: one column per prompt, one row per model and number of steps.

    python scripts/readme_picture.py out/demo docs/teacher_and_student.webp

The columns are the prompts of the evaluation's report, in the same order. No picture is chosen by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# name of the run in the report -> title of the row
ROWS = {
    "teacher 32 steps, guided": "teacher, 32 steps",
    "student 4 steps": "Flash, 4 steps",
    "student 2 steps": "Flash, 2 steps",
    "student 1 step": "Flash, 1 step",
    "teacher 2 steps": "teacher, 2 steps",
    "teacher 1 step": "teacher, 1 step",
}
TILE = 128  # pixels, as the pictures are
MARGIN = 170  # for the rows' names
HEADER = 26  # for the prompts


def compose(evaluation: Path) -> Image.Image:
    """Return the grid of an evaluation's folder (``report.json`` and ``pictures/``)."""
    report = json.loads((evaluation / "report.json").read_text(encoding="utf-8"))
    prompts, files = report["pictures"]["prompts"], report["pictures"]["files"]
    passes = {run["name"]: run["nfe"] for run in report["runs"]}
    sheet = Image.new("RGB", (MARGIN + len(prompts) * TILE, HEADER + len(ROWS) * TILE), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(14)
    for column, prompt in enumerate(prompts):
        draw.text((MARGIN + column * TILE + TILE // 2, 5), prompt, fill="#333333", font=small, anchor="ma")
    for row, (name, title) in enumerate(ROWS.items()):
        top = HEADER + row * TILE
        count = f"{passes[name]} pass{'es' if passes[name] > 1 else ''}"
        draw.text((10, top + TILE // 2 - 18), title, fill="#111111", font=large)
        draw.text((10, top + TILE // 2 + 4), count, fill="#777777", font=small)
        for column, file in enumerate(files[name]):
            picture = Image.open(evaluation / file).convert("RGB").resize((TILE, TILE))
            sheet.paste(picture, (MARGIN + column * TILE, top))
    return sheet


if __name__ == "__main__":
    compose(Path(sys.argv[1])).save(sys.argv[2], quality=88)
