"""Presets of published few-step LoRAs: what each evaluates, how a file is recognised, and the source of every fact."""

from .naming import Recognised, recognise, usual_layout
from .preset import Preset, Scheduler, Timesteps, in_words
from .table import MAX_STEPS, PRESETS, preset_of

__all__ = [
    "MAX_STEPS",
    "PRESETS",
    "Preset",
    "Recognised",
    "Scheduler",
    "Timesteps",
    "in_words",
    "preset_of",
    "recognise",
    "usual_layout",
]
