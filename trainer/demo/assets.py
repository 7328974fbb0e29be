"""The embedded demo: a small text-to-image diffusion teacher, the pictures it learnt from, and how both were made.

Everything a large model has, small: latents and an autoencoder (`patch_pca.py`, `autoencoder.py`), a text encoder and a
UNet (`teacher.py`), real captioned pictures (`pictures.py`, `shards.py`), and a feature network that measures the
results (`features.py`).
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"  # WebDataset shards, one per style, and the licences of the pictures
TEACHER = ROOT / "teacher"  # a diffusers-layout folder: `StableDiffusionPipeline.from_pretrained(TEACHER)`
LORAS = ROOT / "lora"  # the Flash LoRA, and a style LoRA to try beside it: `style.py`
TASK_ADAPTERS = ROOT / "tasks"  # a file for each further task: `task_teacher.py`
CONTROLS = ROOT / "control"  # a T2I-adapter and a Control-LoRA that read edges: `control.py`
FEATURES = ROOT / "features"  # the evaluation network: `FeatureNetwork.from_pretrained(FEATURES)`

__all__ = ["CONTROLS", "DATA", "FEATURES", "LORAS", "ROOT", "TASK_ADAPTERS", "TEACHER"]
