"""Where the cache is, and which store holds what: one folder for each encoder and each task."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ....flash_core.process import NUM_TIMESTEPS, Process
from ...config import DataSection, MethodSection
from ...teachers.hashes import weights_hash
from .store import Store, key_of

if TYPE_CHECKING:
    from ...tasks.base import Task
    from ...teachers.base import Teacher

VERSION = 2  # of encoding: raised when the same encoders give other values
VARIABLE = "FLASH_DIFFUSION_CACHE"
MANIFESTS = "manifests"
KINDS = ("latents", "captions", "conditions", "solutions")  # folders of the stores


def cache_root(folder: Path | None = None) -> Path:
    """Return the folder of the cache: the given one, or the environment's, or the user's."""
    given = folder or os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "flash_diffusion"


def manifests_folder(data: DataSection) -> Path:
    """Return the folder of the manifests."""
    return cache_root(data.cache) / MANIFESTS


def pictures_store(data: DataSection, teacher: Teacher) -> Store:
    """Return the store of pictures' latents."""
    return _store(data, "latents", {"model": teacher.name, "encoder": teacher.image_encoder_hash()})


def caption_store(data: DataSection, teacher: Teacher) -> Store:
    """Return the store of captions' conditions."""
    return _store(data, "captions", {"model": teacher.name, "encoder": teacher.text_encoder_hash()})


def conditions_store(data: DataSection, teacher: Teacher, task: Task) -> Store:
    """Return the store of a task's conditions."""
    about = {
        "model": teacher.name,
        "encoder": teacher.image_encoder_hash(),
        "task": task.name,
        "options": json.dumps(task.options.model_dump(mode="json"), sort_keys=True),
    }
    if teacher.image_adapter is not None:
        adapter = teacher.image_adapter
        about["picture encoder"] = json.dumps([weights_hash(adapter.pipeline.image_encoder), *adapter.reading()])
    if teacher.low_resolution_process is not None:
        about["noise"] = process_hash(teacher.low_resolution_process)
    return _store(data, "conditions", about)


def solutions_store(data: DataSection, teacher: Teacher, method: MethodSection, precision: str) -> Store:
    """Return the store of the latents that the teacher draws of prompts.

    Args:
        precision: the dtype of autocast.
    """
    about = {
        "model": teacher.name,
        "encoder": teacher.text_encoder_hash(),
        "weights": teacher.weights_hash(),
        "process": process_hash(teacher.denoiser.process),
        "method": json.dumps([method.teacher_steps, method.solver, method.guidance, precision]),
    }
    return _store(data, "solutions", about)


def process_hash(process: Process) -> str:
    """Return a hash of a teacher's noise levels and prediction, which its weights don't tell."""
    levels = process.alpha_sigma(torch.arange(NUM_TIMESTEPS, dtype=torch.float32))
    return key_of(process.kind, process.prediction, *(level.numpy().tobytes() for level in levels)).hex()


def _store(data: DataSection, kind: str, about: dict[str, str]) -> Store:
    """Return the store of ``about``. The model's name is for readers only: it does not decide the folder."""
    facts = json.dumps({name: value for name, value in about.items() if name != "model"}, sort_keys=True)
    name = key_of(VERSION, kind, data.cache_dtype, facts).hex()
    folder = cache_root(data.cache) / kind / name
    return Store(folder, {"kind": kind, "dtype": data.cache_dtype, **about}, getattr(torch, data.cache_dtype))
