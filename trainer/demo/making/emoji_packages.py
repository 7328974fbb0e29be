"""``flash-diffusion demo data``: render and caption emoji of the published packages, and write the demo's shards.

`npm pack @lobehub/fluent-emoji-3d @iconify-json/noto @iconify-json/fluent-emoji-flat` fetches the packages as tarballs;
`flash-diffusion demo data --packages FOLDER` reads them (or their unpacked folders) and writes one shard per style.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..assets import DATA
from ..shards import SIZE, Caption, shard_path, write_shard

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

LICENSES = {"fluent3d": "MIT", "noto": "Apache-2.0", "flat": "MIT"}

# The subjects were chosen by eye, for charm and for what a model this small can draw: one big round shape, few thin
# parts, no text, no near-duplicates (with more than eight almost equal grins, they would blur into one another).
# category -> (general caption, code points)
SUBJECTS: dict[str, tuple[str, str]] = {
    "smiley": (
        "smiley face",
        "1f600 1f604 1f601 1f606 1f602 1f642 1f643 1f609 1f60a 1f607 1f970 1f60d 1f929 1f618 1f60b 1f61b 1f92a 1f911 "
        "1f914 1f610 1f611 1f60f 1f644 1f62c 1f60c 1f62a 1f634 1f637 1f922 1f975 1f976 1f635 1f92f 1f920 1f973 1f60e "
        "1f913 1f641 1f62e 1f97a 1f631 1f62d 1f622 1f629 1f621 1f620 1f608",
    ),
    "creature": ("fantasy creature", "1f480 1f4a9 1f921 1f47b 1f47d 1f916 1f984"),
    "cat": ("cartoon cat", "1f431 1f63a 1f639 1f63b 1f63c 1f63d 1f63f 1f640"),
    "monkey": ("cartoon monkey", "1f435 1f648 1f649 1f64a"),
    "animal face": (
        "animal face",
        "1f436 1f43a 1f98a 1f99d 1f981 1f42f 1f42e 1f437 1f42d 1f439 1f430 1f43b 1f43b-200d-2744 1f428 1f43c 1f438",
    ),
    "animal": (
        "small animal",
        "1f423 1f424 1f425 1f427 1f989 1f422 1f433 1f42c 1f419 1f420 1f980 1f40c 1f98b 1f41d 1f41e 1f418",
    ),
    "heart": (
        "heart",
        "2764 1fa77 1f9e1 1f49b 1f49a 1f499 1fa75 1f49c 1f90e 1f5a4 1f498 1f49d 1f496 1f495 1f494",
    ),
    "fruit": (
        "fresh fruit",
        "1f347 1f349 1f34a 1f34b 1f34d 1f34e 1f34f 1f350 1f351 1f352 1f353 1fad0 1f95d 1f345 1f951",
    ),
    "snack": ("tasty snack", "1f369 1f36a 1f9c1 1f366 1f354 1f355 1f370"),
    "plant": ("garden plant", "1f33b 1f337 1f338 1f33a 1f344 1f335 1f332 1f340"),
    "sky": ("sky and weather", "1f31e 1f31d 2b50 1f308 26c4 1f525 1f4a7"),
}


class Package:
    """A published npm package: a tarball, or its unpacked folder."""

    def __init__(self, folder: Path, name: str) -> None:
        """Find package `name` ("@iconify-json/noto") in `folder`, under the name that `npm pack` gives its tarball.

        Raises:
            FileNotFoundError: neither a tarball nor a folder of that name is there.
        """
        found = sorted(folder.glob(f"{name.lstrip('@').replace('/', '-')}*"))
        if not found:
            raise FileNotFoundError(
                f"The package {name} is not in {folder}, neither packed nor unpacked. Fetch it there: npm pack {name}"
            )
        self.root = found[-1]
        self._members: dict[str, bytes] = {}
        if self.root.is_file():
            with tarfile.open(self.root) as tar:
                for member in tar:
                    if member.isfile() and (stream := tar.extractfile(member)) is not None:
                        self._members[member.name.split("/", 1)[1]] = stream.read()

    def names(self) -> list[str]:
        """Return every file of the package, relative to its root."""
        if self._members:
            return sorted(self._members)
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        """Return the bytes of one file."""
        return self._members[name] if self._members else (self.root / name).read_bytes()


def _normalised(code: str) -> str:
    """Return code points without the variation selector U+FE0F, which only some packages write."""
    return code.lower().replace("-fe0f", "")


def decode_on_white(data: bytes) -> Image.Image:
    """Decode a picture and return it on white, (SIZE, SIZE) RGB."""
    from PIL import Image

    from ...pictures import on_white

    picture = on_white(Image.open(io.BytesIO(data)).convert("RGBA"))
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def fluent3d(packages: Path) -> Callable[[str], Image.Image]:
    """Return a function from code to picture, for Microsoft Fluent 3D (256 px WebP)."""
    package = Package(packages, "@lobehub/fluent-emoji-3d")
    files = {_normalised(Path(name).stem): name for name in package.names() if name.endswith(".webp")}
    return lambda code: decode_on_white(package.read(files[code]))


def iconify(packages: Path, name: str) -> Callable[[str], Image.Image]:
    """Return a function from code to picture, for a package of SVG bodies in one JSON (Iconify's format)."""
    import resvg_py

    package = Package(packages, name)
    icons = json.loads(package.read("icons.json"))
    names = {_normalised(code): name for code, name in json.loads(package.read("chars.json")).items()}

    def render(code: str) -> Image.Image:
        name = names[code]
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        # Rendered at twice the size and reduced: resvg's own antialiasing is coarser than Lanczos.
        return decode_on_white(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE)))

    return render


def noto(packages: Path) -> Callable[[str], Image.Image]:
    """Return a function from code to picture, for Google Noto (SVG)."""
    return iconify(packages, "@iconify-json/noto")


def flat(packages: Path) -> Callable[[str], Image.Image]:
    """Return a function from code to picture, for Microsoft Fluent flat (SVG): the teacher's shapes, plain colours."""
    return iconify(packages, "@iconify-json/fluent-emoji-flat")


STYLES: dict[str, Callable[[Path], Callable[[str], Image.Image]]] = {"fluent3d": fluent3d, "noto": noto, "flat": flat}


def unseen_style(packages: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and pictures (3, H, W) in [0, 1] of the subjects in Fluent flat, which no feature network learnt."""
    from ...pictures import picture_bytes

    render = flat(packages)
    for caption in captions("fluent3d"):
        try:
            picture = render(caption.code)
        except KeyError:  # this style draws fewer emoji
            continue
        yield caption.name, picture_bytes(picture) / 255


def captions(style: str) -> list[Caption]:
    """Return the captions of all subjects in a style, in the order of `SUBJECTS`."""
    import emoji

    # The table writes "heart with arrow" as ":heart_with_arrow:", some with U+FE0F after the first code point.
    named = {
        _normalised("-".join(f"{ord(char):x}" for char in text)): entry["en"].strip(":").replace("_", " ").lower()
        for text, entry in emoji.EMOJI_DATA.items()
    }
    return [
        Caption(code, named[code], general, category, style, LICENSES[style])
        for category, (general, codes) in SUBJECTS.items()
        for code in codes.split()
    ]


def build(packages: Path, folder: Path = DATA) -> dict[str, int]:
    """Write every style's shard into `folder`, and return style -> number of pictures."""
    counts = {}
    for style, renderer in STYLES.items():
        render = renderer(packages)
        counts[style] = write_shard(
            ((caption, render(caption.code)) for caption in captions(style)), shard_path(style, folder)
        )
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `flash-diffusion demo data`."""
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder with the npm tarballs, or with their unpacked folders"
    )
    parser.add_argument(
        "--output", type=Path, default=DATA, help="folder to write the shards into (default: the demo's own)"
    )


def run(args: argparse.Namespace) -> int:
    """Build the shards."""
    for style, count in build(args.packages, args.output).items():
        path = shard_path(style, args.output)
        logger.info("%s: %d pictures, %.2f MB (%s)", style, count, path.stat().st_size / 1e6, LICENSES[style])
    return 0
