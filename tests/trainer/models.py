"""Tiny random models and pictures in the real formats, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..families.pipelines import save_pipeline

CAPTIONS = ("red ball", "green box", "blue cone", "a yellow star", "grey cloud", "red ball")


def tiny_stable_diffusion(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """A random Stable Diffusion 1.5 of every true part, 8 x 8 latents of 64 px pictures, as a diffusers folder."""
    return save_pipeline("sd15", folder, seed, **scheduler)


def picture_folder(folder: Path, count: int = 6, size: int = 64) -> Path:
    """Random pictures with captions beside them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(CAPTIONS[index % len(CAPTIONS)])
    return folder


def tiny_recipe(model: Path, pictures: Path, **fields: Any) -> dict[str, Any]:
    """A recipe that runs in seconds and computes every term."""
    recipe: dict[str, Any] = {
        "model": {"family": "sd15", "path": str(model)},
        "data": {"source": "folder", "path": str(pictures)},
        "lora": {"rank": 4, "alpha": 8},
        "method": {"teacher_steps": 4, "guidance": [1.5, 3.0]},
        "phases": [
            {"name": "warm-up", "updates": 2, "modes": [0, 0, 0.5, 0.5]},
            {"name": "all", "updates": 3, "modes": [0.4, 0.2, 0.2, 0.2], "adversarial": 0.3, "dmd": 0.7},
        ],
        "optimizer": {"lr": 1e-3, "discriminator_lr": 1e-3},
        "batch_size": 2,
        "preview": {"every": 0, "prompts": ["red ball"], "steps": [1]},
        "checkpoint": {"every": 2, "keep": 2},
        "log_every": 1,
    }
    return {**recipe, **fields}
