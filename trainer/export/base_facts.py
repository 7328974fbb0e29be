"""What an export says of the base, kept in the run from its start: hours later the base may be elsewhere.

``base.json`` lies beside ``config.yaml``. Runs of earlier versions have none; their exports read the base again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...flash_core.process import FlowProcess, Process, VPProcess
from ..config import ControlSection, Recipe
from ..errors import UserError
from ..files import write_text_whole
from ..teachers import family, outline_teacher
from ..teachers.base import Outline, Teacher
from ..teachers.conditions.control import KINDS, SCALES, find_control

FILE = "base.json"


@dataclass(frozen=True)
class ControlFacts:
    """The ControlNet or T2I-adapter of a run.

    Attributes:
        title: name, kind and scale.
        file: the name of its single file; empty for a folder or Hub name.
        place: the folder or Hub name; empty for a single file.
        kind: its class in diffusers; empty for a single file.
        scale: factor of its residuals; 0 for a single file.
        grey: True if it reads one channel.
    """

    title: str
    file: str
    place: str
    kind: str
    scale: float
    grey: bool


@dataclass(frozen=True)
class BaseFacts:
    """The base of a run.

    Attributes:
        name: the name of the model.
        architecture: its name in ModelSpec.
        process: its noise process.
        control: the network that reads hints; None without one.
    """

    name: str
    architecture: str
    process: Process
    control: ControlFacts | None = None


def facts_of(recipe: Recipe, base: Teacher | Outline) -> BaseFacts:
    """Return the facts of a loaded or outlined base."""
    process = base.denoiser.process
    architecture = family(recipe.model.family).architecture(base.denoiser.network.config, process)
    control = base.denoiser.control
    if recipe.model.control is None or control is None:
        return BaseFacts(base.name, architecture, process)
    return BaseFacts(base.name, architecture, process, control_facts(recipe.model.control, control.title))


def control_facts(section: ControlSection, title: str) -> ControlFacts:
    """Return the facts of the network that a recipe names, from its configuration."""
    source = find_control(section)
    kind = source.config.get("_class_name", "")
    scale = source.scale if source.scale is not None or not kind else SCALES[KINDS[kind]]
    return ControlFacts(
        title,
        "" if source.file is None else source.file.name,
        source.folder,
        kind,
        scale or 0.0,
        kind == "T2IAdapter" and source.config.get("in_channels") == 1,
    )


def write_base_facts(run: Path, recipe: Recipe, base: Teacher | Outline) -> None:
    """Write the facts of a base into a run's folder."""
    facts = facts_of(recipe, base)
    content = {
        "name": facts.name,
        "architecture": facts.architecture,
        "process": _as_json(facts.process),
        "control": None if facts.control is None else asdict(facts.control),
    }
    write_text_whole(run / FILE, json.dumps(content, indent=2) + "\n")


def read_base_facts(run: Path, recipe: Recipe) -> BaseFacts:
    """Return the facts in a run's folder; for a run of an earlier version those of its base.

    Raises:
        UserError: the file is damaged, or there is none and the base can't be read.
    """
    path = run / FILE
    if not path.is_file():
        return facts_of(recipe, outline_teacher(recipe.model, recipe.data.resolution))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        control = content["control"]
        return BaseFacts(
            str(content["name"]),
            str(content["architecture"]),
            _process(content["process"]),
            None if control is None else ControlFacts(**control),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read: {error!r}; delete it, and the facts of the base are read from the base itself"
        ) from error


def _as_json(process: Process) -> dict[str, Any]:
    if isinstance(process, FlowProcess):
        return {"shift": process.shift}
    assert isinstance(process, VPProcess)
    return {"prediction": process.prediction, "alphas_cumprod": process.alphas_cumprod.double().tolist()}


def _process(content: Mapping[str, Any]) -> Process:
    if "shift" in content:
        return FlowProcess(float(content["shift"]))
    alphas = torch.tensor(content["alphas_cumprod"], dtype=torch.float64)
    return VPProcess(alphas, content["prediction"])
