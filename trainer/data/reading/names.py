"""Tell from a file's name what it is: a picture, a companion of a picture, a caption, or a file that is not read."""

from __future__ import annotations

from collections import Counter
from functools import cache, lru_cache
from importlib.util import find_spec

from .samples import COMPANIONS

CAPTION_SUFFIXES = ("txt", "caption", "json")  # in the order in which they are looked for
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tzst")
PROMPT_SUFFIXES = (".txt", ".json", ".jsonl")
# Formats of Pillow that are no pictures of their own: drawings that another program renders, data, films.
NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
HEIF = {"heic": "HEIF", "heif": "HEIF", "hif": "HEIF"}
HEIF_ADVICE = "pip install pillow-heif to read .heic and .heif, or convert them to .jpg"
SHOWN_SUFFIXES = 8  # in a message
PICTURE, CAPTION, OTHER = "picture", "caption", "other"


@cache
def picture_formats() -> dict[str, str]:
    """Return suffix -> Pillow's name of the format, for all formats that are read here."""
    from PIL import Image

    suffixes = Image.registered_extensions()  # loads all plugins
    formats = {
        suffix.lstrip("."): name
        for suffix, name in suffixes.items()
        if name in Image.OPEN and name not in NO_PICTURES and "." not in suffix[1:]
    }
    if find_spec("pillow_heif") is not None:
        from pillow_heif import register_heif_opener

        register_heif_opener()
        formats |= HEIF
    return formats


@cache
def format_order() -> tuple[str, ...]:
    """Return the formats that are read, in the order in which a file is taken for one of them.

    Formats without a signature (TGA) take many files for their own, so they come last. Pillow's own order depends on
    what a process has opened before.
    """
    from PIL import Image

    return tuple(sorted(set(picture_formats().values()), key=lambda name: (Image.OPEN[name][1] is None, name)))


def split_name(name: str) -> tuple[str, str]:
    """Return a file's stem and kind: ``picture``, a companion's name, ``caption`` or ``other``.

    The stem is the name before the longest known ending: ``photo.of.fox`` of ``photo.of.fox.png``, ``0001`` of
    ``0001.mask.png``.
    """
    stem, _, suffix = name.rpartition(".")
    suffix = suffix.lower()
    if not stem:
        return name, OTHER
    if suffix in CAPTION_SUFFIXES:
        return stem, CAPTION
    if suffix not in picture_formats():
        return stem, OTHER
    owner, _, companion = stem.rpartition(".")
    if owner and companion in COMPANIONS:
        return owner, companion
    return stem, PICTURE


@lru_cache(1024)
def kind_of(ending: str) -> str:
    """Return the kind of an ending without its stem: ``picture`` of ``png``, ``mask`` of ``mask.png``."""
    return split_name(f"x.{ending}")[1]


def is_hidden(name: str) -> bool:
    """Return True for a file or folder that systems add beside the user's: ``._0001.png``, ``.git``, ``__MACOSX``."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def suffix_of(name: str) -> str:
    """Return a name's suffix for a count of files that are not read, such as ``.heic``."""
    stem, _, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if stem else "files without a suffix"


def not_read(suffixes: Counter[str]) -> str:
    """Return a sentence on the files that are not read, "" without such files."""
    if not suffixes:
        return ""
    total = sum(suffixes.values())
    names = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(SHOWN_SUFFIXES))
    more = "" if len(suffixes) <= SHOWN_SUFFIXES else f" and {len(suffixes) - SHOWN_SUFFIXES} other kinds"
    heif = any(suffix.lstrip(".") in HEIF for suffix in suffixes)
    advice = f"; {HEIF_ADVICE}" if heif else ""
    files = "file is" if total == 1 else "files are"
    return f"{total} {files} not read ({names}{more}){advice}"
