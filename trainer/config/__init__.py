"""The fields of a recipe: meaning, unit, range and default of each, and errors that name the field."""

from __future__ import annotations

from .data import DataSection
from .method import MethodSection
from .problems import explain, parse_recipe
from .recipe import (
    ControlSection,
    ImageAdapterSection,
    ModelSection,
    OptimizerSection,
    PhaseSection,
    Recipe,
    SamplerSection,
    StyleLora,
    TaskSection,
    TrajectorySection,
)
from .section import Section

__all__ = [
    "ControlSection",
    "DataSection",
    "ImageAdapterSection",
    "MethodSection",
    "ModelSection",
    "OptimizerSection",
    "PhaseSection",
    "Recipe",
    "SamplerSection",
    "Section",
    "StyleLora",
    "TaskSection",
    "TrajectorySection",
    "explain",
    "parse_recipe",
]
