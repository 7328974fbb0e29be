"""The feature network and the reference of a teacher, where the options name none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...demo.assets import ROOT, embedded_home

if TYPE_CHECKING:
    from ...config import ModelSection

REFERENCE = "reference.safetensors"


def embedded_folder(section: ModelSection) -> Path:
    """Return the folder with an embedded teacher's network and reference; the demo's for teachers of the user's own."""
    home = embedded_home(section.path) if section.family == "demo" else None
    return ROOT if home is None else home


def default_features(section: ModelSection) -> Path:
    """Return the network that describes a teacher's pictures."""
    return embedded_folder(section) / "features"


def default_reference(section: ModelSection) -> Path:
    """Return the stored reference to try first."""
    return embedded_folder(section) / REFERENCE
