"""Flash Distill's losses are the headless trainer's, with the same prompts, seeds, settings and start of the LoRA.

The whole node runs in ComfyUI, and the whole ``distil`` of the trainer here: text encoders, recorded trajectories, the
order of the samples, noise, optimiser, clipping and schedule.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flash_diffusion.flash_core.lora import FlashMetadata, write_lora
from flash_diffusion.trainer.config import ModelSection, parse_recipe
from flash_diffusion.trainer.distill.loop import distil
from flash_diffusion.trainer.teachers import load_teacher

from .inside_comfyui import run_inside

pytestmark = pytest.mark.comfy

PROMPTS = ("red apple", "unicorn", "animal face")
UPDATES, TRAJECTORIES, SAMPLES, STEPS, RANK, RATE, SEED = 10, 6, 4, 4, 4, 2e-3, 7
MODES = (0.55, 0.2, 0.15, 0.1)
LAST = 3  # 30 % of the updates
FIRST_STEP = {
    "name": "first step",
    "updates": LAST,
    "modes": [0.5, 0.2, 0.15, 0.15],
    "learning_rate": 0.4,
    "first_step_distillation": 0.5,
    "dmd": 0.15,
}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
TARGETS = (*TARGETS, "conv1", "conv2", "time_emb_proj", "conv_shortcut")
TOLERANCE = 1e-3  # of each loss


def recipe(folder: Path) -> dict[str, Any]:
    """Return what the node does as a recipe."""
    return {
        "model": {"family": "demo"},
        "data": {"source": "prompts", "path": str(folder / "prompts.txt"), "cache": str(folder / "cache")},
        "lora": {"rank": RANK, "alpha": RANK, "targets": list(TARGETS), "start": str(folder / "start.safetensors")},
        "method": {
            "teacher_steps": STEPS,
            "solver": "dpmpp_2m",
            "guidance": [3, 3],
            "distillation": "mse",
            "fake_score": "student",
            "dmd": {"form": "decoupled", "rows": "first_step"},
        },
        "phases": [{"name": "distillation", "updates": UPDATES - LAST, "modes": list(MODES)}, FIRST_STEP],
        "optimizer": {
            "lr": RATE,
            "betas": [0.9, 0.99],
            "weight_decay": 0,
            "schedule": "cosine",
            "decay_from": 0.3,
            "warmup": UPDATES // 5,
        },
        "batch_size": SAMPLES,
        "gradient_clip": 1.0,
        "ema": 0.99,
        "seed": SEED,
        "log_every": 1,
        "trajectories": {"count": TRAJECTORIES, "batch": SAMPLES, "split": True},
        "sampler": {"stochasticity": 0.5},
        "preview": {"every": 0},
    }


def test_losses_of_node_and_trainer_are_equal(runtime: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    denoiser = load_teacher(ModelSection(family="demo")).denoiser
    denoiser.add_adapter("student", RANK, RANK, TARGETS, seed=1)
    metadata = FlashMetadata("flash-demo", "v_prediction", "vp", timesteps={})
    write_lora(tmp_path / "start.safetensors", denoiser.adapter("student"), metadata)
    inputs = {"prompts": "\n".join(PROMPTS), "name": "same", "preset": "quick try", "width": 0, "height": 0}
    inputs |= {"guidance": 3.0, "seed": SEED, "rank": RANK, "learning_rate": RATE, "updates": UPDATES}
    inputs |= {"trajectories": TRAJECTORIES, "samples": SAMPLES, "at_once": SAMPLES, "teacher_steps": STEPS}
    (tmp_path / "inputs.json").write_text(json.dumps({**inputs, "preview_every": 0}))

    ours = json.loads(run_inside(runtime, "same_losses.py", tmp_path).splitlines()[-1])
    distil(parse_recipe(recipe(tmp_path)), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    theirs = [line["distillation"] for line in lines if "distillation" in line]
    assert len(ours) == len(theirs) == UPDATES
    assert max(ours) > 1.05 * min(ours)
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
