"""Read COCO's captions and find its pictures: ``annotations/captions_val2017.json`` and the folder ``val2017``."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from .protocols import CocoProtocol

DRAW_SEED = 0  # of the choice and the order of captions; not of the noise


@dataclass(frozen=True)
class Caption:
    """One caption to draw.

    Attributes:
        number: of COCO's picture; for captions from a text file the line, from 0.
        picture: COCO's picture; None for captions from a text file.
    """

    number: int
    text: str
    picture: Path | None = None


@dataclass(frozen=True)
class Coco:
    """Captions and pictures of a protocol.

    Attributes:
        captions: to draw, in order.
        pictures: the reference, in the order of their numbers.
        rule: how the captions were chosen, in words.
    """

    captions: tuple[Caption, ...]
    pictures: tuple[Path, ...]
    rule: str


def read_coco(
    folder: Path, protocol: CocoProtocol, samples: int | None = None, captions: Sequence[str] | None = None
) -> Coco:
    """Read the captions and find every picture.

    Of each picture the caption with the lowest id is taken; pictures without a caption are left out. The order of the
    pictures is shuffled, always in the same way, so n captions are the first n of any larger draw.

    Args:
        samples: captions to draw; None = the protocol's number.
        captions: to draw instead of COCO's; the first ``samples`` are taken.

    Raises:
        UserError: the folder is not laid out as COCO, pictures are missing, or there are too few captions.
    """
    names, by_picture = _read_annotations(folder / protocol.annotations)
    pictures = _find_pictures(folder / protocol.pictures, names)
    wanted = protocol.samples if samples is None else samples
    if captions is not None:
        found = [Caption(number, text) for number, text in enumerate(captions)]
        rule = "the first lines of the prompts file"
    else:
        order = sorted(by_picture)
        random.Random(f"{protocol.name}/{DRAW_SEED}").shuffle(order)
        found = [Caption(number, by_picture[number], pictures[number]) for number in order]
        rule = (
            f"of each picture in {protocol.annotations} the caption with the lowest id; the pictures in an order "
            f"shuffled with seed {DRAW_SEED}"
        )
    if len(found) < wanted:
        where = "the prompts file" if captions is not None else folder / protocol.annotations
        raise UserError(
            f"{where} has {len(found)} captions to draw, {protocol.name} needs {wanted}; pass --samples {len(found)} "
            "for a smaller evaluation; the report will say that it is smaller"
        )
    return Coco(tuple(found[:wanted]), tuple(pictures[number] for number in sorted(pictures)), rule)


def _read_annotations(path: Path) -> tuple[dict[int, str], dict[int, str]]:
    """Return the file name and the caption with the lowest id of each picture, by the picture's number."""
    if not path.is_file():
        raise UserError(
            f"there is no {path}; --coco takes the folder that holds {path.parent.name}/ and the pictures' folder, as "
            "https://cocodataset.org/#download unpacks them"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {int(entry["id"]): str(entry["file_name"]) for entry in content["images"]}
        captions: dict[int, tuple[int, str]] = {}
        for entry in content["annotations"]:
            number, candidate = int(entry["image_id"]), (int(entry["id"]), " ".join(entry["caption"].split()))
            captions[number] = min(candidate, captions.get(number, candidate))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a COCO captions file ({type(error).__name__}: {error}); expected JSON with images (id, "
            "file_name) and annotations (id, image_id, caption)"
        ) from error
    if unknown := captions.keys() - names.keys():
        raise UserError(f"{path}: {len(unknown)} captions are of pictures it does not list, such as {min(unknown)}")
    for number, name in names.items():
        if Path(name).name != name:
            raise UserError(f"{path}: picture {number} is called {name!r}; expected a file name, without a folder")
    return names, {number: text for number, (_, text) in captions.items() if text}


def _find_pictures(folder: Path, names: dict[int, str]) -> dict[int, Path]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --coco takes the folder that holds it and annotations/")
    there = {path.name for path in folder.iterdir()}
    missing = sorted(set(names.values()) - there)
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(names)} pictures, such as {missing[0]}; the reference needs "
            "all pictures, so unpack COCO's archive again"
        )
    return {number: folder / name for number, name in names.items()}
