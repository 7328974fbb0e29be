"""A contact sheet: columns of pictures under their labels, as one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# In pixels.
GAP = 4
LEAST_COLUMN = 120  # in a narrower column a label would need a line for each word
LABEL_SIZES = (11, 40)  # smallest and largest font
LETTERS = 22  # about as many fit into a line of a label


def draw_grid(pictures: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """Draw columns of pictures; their labels stand above them, black on white.

    Args:
        pictures: (B, H, W, 3) in 0..1 for each column.
        labels: a text for each column; long lines are wrapped.

    Returns:
        (1, height, width, 3) in 0..1.
    """
    batch, height, width = pictures[0].shape[:3]
    column = max(width, LEAST_COLUMN)
    font = ImageFont.load_default(min(max(column // LETTERS, LABEL_SIZES[0]), LABEL_SIZES[1]))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    wrapped = [wrap(label, lambda text: measure.textlength(text, font) <= column) for label in labels]
    top = 2 * GAP + round(max(measure.multiline_textbbox((0, 0), text, font)[3] for text in wrapped))
    sheet = Image.new("RGB", (GAP + len(labels) * (column + GAP), top + batch * (height + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (images, text) in enumerate(zip(pictures, wrapped, strict=True)):
        left = GAP + index * (column + GAP)
        draw.multiline_text((left, GAP), text, "black", font)
        for row, image in enumerate(images):
            values = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            sheet.paste(Image.fromarray(values), (left + (column - width) // 2, top + row * (height + GAP)))
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]


def wrap(text: str, fits: Callable[[str], bool]) -> str:
    """Break lines at spaces until each line fits; a word that is too long stays whole."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for word in line.split(" "):
            longer = f"{current} {word}".strip()
            if current and not fits(longer):
                lines.append(current)
                longer = word
            current = longer
        lines.append(current)
    return "\n".join(lines)
