"""Render letters and digits of published font packages: the pictures that the glyph teacher learns from.

`npm pack @fontsource/lora @fontsource/roboto ...` fetches the packages as tarballs (`fonts.json` beside the teacher
lists the families that it learnt from). Pillow reads their woff2 files. A font's capital H has a fixed height and all
glyphs share one baseline, so that "o", "O" and "0" differ in size and place.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ....errors import UserError
from ..emoji_packages import Package

if TYPE_CHECKING:
    from PIL import ImageFont

logger = logging.getLogger(__name__)

SIZE = 64  # pixels, width and height
CAPITAL_HEIGHT, BASELINE = 32, 45  # pixels; from the top
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
CATEGORIES = ("sans serif", "serif", "handwriting", "display", "monospace")
WEIGHTS = {400: "regular", 700: "bold"}
LICENSES = ("OFL-1.1", "Apache-2.0")  # as the packages name them; fonts of other licences are left out
HELD_OUT_FAMILY = 10  # every tenth family of a category is never trained on
HELD_OUT_PAIR = 15  # of the pairs (glyph, category), every fifteenth is never trained on
SAME_SHAPE = 25.0  # mean absolute difference, of 255, of two shapes at one size, below which they are the same


@dataclass(frozen=True)
class Glyph:
    """One picture: the character, and the family, category and weight of its font."""

    character: str
    family: str
    category: str
    weight: str

    @property
    def name(self) -> str:
        """Return the character in words: "capital letter a", "small letter a", "digit 7"."""
        return name_of(self.character)

    @property
    def caption(self) -> str:
        """Return the whole caption: "small letter a, handwriting, bold"."""
        return f"{self.name}, {self.category}, {self.weight}"

    @property
    def has_held_out_pair(self) -> bool:
        """Return whether the pair of character and category is kept from training."""
        # Other glyphs of each category: shifted by three.
        return (GLYPHS.index(self.character) + 3 * CATEGORIES.index(self.category)) % HELD_OUT_PAIR == 0


@dataclass(frozen=True)
class GlyphSet:
    """Pictures (N, 64, 64) uint8, black on white, and their N descriptions."""

    images: Tensor
    glyphs: list[Glyph]

    def __len__(self) -> int:
        return len(self.glyphs)

    def where(self, chosen: list[bool]) -> GlyphSet:
        """Return the chosen pictures."""
        return GlyphSet(self.images[torch.tensor(chosen)], [g for g, c in zip(self.glyphs, chosen, strict=True) if c])

    def split(self) -> tuple[GlyphSet, GlyphSet]:
        """Return the pictures to train on, and those of held-out families."""
        held_out = held_out_families(self.glyphs)
        train = [g.family not in held_out and not g.has_held_out_pair for g in self.glyphs]
        return self.where(train), self.where([g.family in held_out for g in self.glyphs])


def name_of(character: str) -> str:
    """Return a character in words. CLIP's tokenizers read lower case only, so that "A" and "a" need other words."""
    if character.isdigit():
        return f"digit {character}"
    return f"{'capital' if character.isupper() else 'small'} letter {character.lower()}"


def held_out_families(glyphs: list[Glyph]) -> set[str]:
    """Return every tenth family of each category, in alphabetical order."""
    families = sorted({(glyph.category, glyph.family) for glyph in glyphs})
    return {
        family
        for category in CATEGORIES
        for family in [name for kind, name in families if kind == category][HELD_OUT_FAMILY // 2 :: HELD_OUT_FAMILY]
    }


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Return a character centred on white, (64, 64) uint8; None where it is empty or larger than the picture."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character, anchor="ls")
    width = right - left
    x = (SIZE - width) // 2 - left
    if width <= 0 or width > SIZE - 4 or BASELINE + top < 1 or BASELINE + bottom > SIZE - 1:
        return None
    picture = Image.new("L", (SIZE, SIZE), 255)
    ImageDraw.Draw(picture).text((x, BASELINE), character, font=font, fill=0, anchor="ls")
    return np.asarray(picture)


def sized(data: bytes) -> ImageFont.FreeTypeFont:
    """Return a font at the size at which its capital H is `CAPITAL_HEIGHT` pixels high."""
    from PIL import ImageFont

    trial = ImageFont.truetype(io.BytesIO(data), 200)
    _, top, _, bottom = trial.getbbox("H", anchor="ls")
    return ImageFont.truetype(io.BytesIO(data), 200 * CAPITAL_HEIGHT / max(bottom - top, 1))


def glyphs_of(package: Package) -> Iterator[tuple[Glyph, np.ndarray]]:
    """Yield the pictures of one family, regular and bold. Small letters that are drawn as capitals are left out."""
    facts = json.loads(package.read("metadata.json"))
    category, license = facts["category"].replace("-", " "), facts["license"]["type"]
    if category not in CATEGORIES or license not in LICENSES:
        logger.warning("%s is left out: %s, %s", facts["id"], category, license)
        return
    for number, weight in WEIGHTS.items():
        name = f"files/{facts['id']}-latin-{number}-normal.woff2"
        if name not in package.names():
            continue
        font = sized(package.read(name))
        small_capitals = has_small_capitals(font)
        for character in GLYPHS:
            if not (small_capitals and character.islower()) and (picture := render(font, character)) is not None:
                yield Glyph(character, facts["id"], category, weight), picture


def has_small_capitals(font: ImageFont.FreeTypeFont) -> bool:
    """Return whether a font draws its small letters as capitals, of the same size or smaller."""
    from PIL import Image, ImageDraw

    def shape(character: str) -> np.ndarray:
        picture = Image.new("L", (4 * SIZE, 4 * SIZE))
        ImageDraw.Draw(picture).text((2 * SIZE, 2 * SIZE), character, font=font, fill=255, anchor="mm")
        return np.asarray(picture.crop(picture.getbbox()).resize((32, 32))).astype(float)

    return all(np.abs(shape(letter) - shape(letter.upper())).mean() < SAME_SHAPE for letter in "aeg")


def read_fonts(packages: Path) -> tuple[GlyphSet, list[dict[str, str]]]:
    """Render every font package in a folder. Return the pictures, and name, version and licence of each family.

    Raises:
        UserError: there are no font packages.
    """
    # With the version: without it, "alegreya" would find "alegreya-sans" too.
    names = sorted(path.name.removeprefix("fontsource-")[:-4] for path in packages.glob("fontsource-*.tgz"))
    if not names:
        raise UserError(
            f"--packages: there are no font packages in {packages}; fetch some there, such as `npm pack "
            "@fontsource/lora @fontsource/roboto`"
        )
    images, glyphs, families = [], [], []
    for name in names:
        package = Package(packages, f"@fontsource/{name}")
        found = list(glyphs_of(package))
        if not found:
            continue
        glyphs += [glyph for glyph, _ in found]
        images += [torch.from_numpy(picture.copy()) for _, picture in found]
        license = json.loads(package.read("metadata.json"))["license"]
        families.append(
            {
                "package": f"@fontsource/{found[0][0].family}",
                "version": json.loads(package.read("package.json"))["version"],
                "category": found[0][0].category,
                "license": license["type"],
                "attribution": license.get("attribution", ""),
            }
        )
    return GlyphSet(torch.stack(images), glyphs), families
