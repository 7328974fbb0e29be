"""Paths of the embedded demo's files.

The demo is a small text-to-image diffusion model with the parts of a large one: an autoencoder, a text encoder, a UNet,
captioned pictures, and a network that measures pictures. The commands in `making/` made the files.
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

__all__ = ["CONTROLS", "DATA", "FEATURES", "LORAS", "ROOT", "TASK_ADAPTERS", "TEACHER"]
