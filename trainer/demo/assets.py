"""Paths of the embedded demo's files, and of the second embedded teacher's.

The demo is a small text-to-image diffusion model with the parts of a large one: an autoencoder, a text encoder, a UNet,
captioned pictures, and a network that measures pictures. The second teacher draws letters and digits in many typefaces;
it comes with captions in the place of pictures. The commands in `making/` made the files.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"  # WebDataset shards, one per style, with the licences of the pictures
TEACHER = ROOT / "teacher"  # a diffusers folder: `StableDiffusionPipeline.from_pretrained(TEACHER)`
LORAS = ROOT / "lora"  # the Flash LoRAs, and a style LoRA to use with them
TASK_ADAPTERS = ROOT / "tasks"  # one task adapter for each further task
CONTROLS = ROOT / "control"  # a T2I-adapter and a Control-LoRA that read Canny edges
FEATURES = ROOT / "features"  # the network that measures: `FeatureNetwork.from_pretrained(FEATURES)`
GLYPHS = ROOT / "glyphs"  # the second teacher, with `teacher`, `features` and `reference.safetensors` as in ROOT
GLYPH_CAPTIONS = GLYPHS / "captions.txt"  # that it was trained on; `unseen.txt` beside has pairs that it never saw

NAMED = {"glyphs": GLYPHS}  # for `model: {family: demo, path: NAME}`


def embedded_home(path: Path | str | None) -> Path | None:
    """Return the folder with `teacher` and `features` of an embedded teacher, or None for a path of the user's own.

    Args:
        path: of the recipe's model: None = the demo, "glyphs" = the second teacher. A folder of that name in the
            working directory wins over the name.
    """
    if path is None:
        return ROOT
    return None if Path(path).exists() else NAMED.get(str(path))


__all__ = [
    "CONTROLS",
    "DATA",
    "FEATURES",
    "GLYPHS",
    "GLYPH_CAPTIONS",
    "LORAS",
    "ROOT",
    "TASK_ADAPTERS",
    "TEACHER",
    "embedded_home",
]
