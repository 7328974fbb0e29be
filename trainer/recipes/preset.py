"""Presets: whole recipes for every family and size, of which a user's recipe holds only the model and the data.

A preset is one commented YAML file in ``presets/``. Its parts, each above the one before: ``common``; ``by_size`` and
``from_size``, from the model's parameters; ``families``; ``tasks``; ``by_data``, from the number of samples. The
recipe's own fields stand above all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .merging import merged, value_at, with_value
from .size import data_size, model_size

FOLDER = Path(__file__).resolve().parent / "presets"
PRESET = "preset"
UNKNOWN_SAMPLES = "the number of samples is not known before they are read"
SMALL = 1e8  # parameters below which the published settings learn almost nothing


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def with_preset(name: Any, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a recipe's content on top of a preset, and lines that say what was chosen and why.

    Args:
        content: the recipe's fields, unchecked.

    Raises:
        UserError: there is no such preset.
    """
    if name not in preset_names():
        raise UserError(f"{PRESET}: there is no preset {name!r}; expected one of {', '.join(preset_names())}")
    preset = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    model, data = (part if isinstance(part := content.get(key), Mapping) else {} for key in ("model", "data"))
    parameters, whence = model_size(model)
    reasons = [f"preset {name}: {preset['about']}", f"model: {in_words(parameters)} parameters ({whence})"]
    fields, updates, why = deepcopy(preset["common"]), None, ""
    for key, sizes in preset.get("by_size", {}).items():
        value = between(sizes, parameters)
        if key == "updates":
            updates, why = int(value), f"by the model's size ({_table(sizes)})"
            continue
        fields = with_value(fields, key, value)
        reasons.append(f"{key}: {value:g}, by the model's size ({_table(sizes)})")
    for least, changes in preset.get("from_size", {}).items():
        if parameters >= float(least):
            fields = merged(fields, changes)
            reasons.append(f"{_flat(changes)}: from {in_words(float(least))} parameters on")
    own = preset.get("families", {}).get(model.get("family"), {})
    fields = merged(fields, {key: value for key, value in own.items() if key != "updates"})
    task = content.get("task")
    if isinstance(task, Mapping):
        fields = merged(fields, preset.get("tasks", {}).get(task.get("name"), {}))
    if "updates" in own:
        updates, why = own["updates"], f"{own['updates']} in each phase, for {model.get('family')}"
    whole = merged(fields, content)
    for key, rule in preset.get("by_data", {}).items():
        if key == "updates":
            updates, why = _epochs(rule, whole)
            continue
        samples, counted = data_size(data)
        value = rule["most"] if samples is None else min(max(rule["each"] * samples, rule["least"]), rule["most"])
        fields = with_value(fields, key, value)
        whole = merged(fields, content)
        per = UNKNOWN_SAMPLES if samples is None else f"{rule['each']} for each of {samples} samples ({counted})"
        reasons.append(f"{key}: {value}: {per}, from {rule['least']} to {rule['most']}")
    fields["phases"] = _phases(fields["phases"], updates)
    if updates is not None and "phases" not in content:
        reasons.append(f"updates: {sum(phase['updates'] for phase in fields['phases'])}: {why}")
    if name == "paper" and parameters < SMALL:
        reasons.append("these rates and ranks were published for models of 600 M parameters and more; see preset best")
    return merged(fields, content), reasons + _above(fields, content)


def between(sizes: Mapping[float, float], parameters: float) -> float | int:
    """Return the value of a table at a size: linear in the logarithms between two rows, constant outside.

    Whole numbers stay whole, and from 8 on multiples of 4; other numbers have two digits.
    """
    rows = sorted((float(size), float(value)) for size, value in sizes.items())
    below = max((row for row in rows if row[0] <= parameters), default=rows[0])
    above = min((row for row in rows if row[0] >= parameters), default=rows[-1])
    share = 0.0
    if above[0] > below[0]:
        share = math.log(parameters / below[0]) / math.log(above[0] / below[0])
    value = math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))
    if not all(isinstance(given, int) for given in sizes.values()):
        return float(f"{value:.2g}")
    return round(value) if value < 8 else 4 * round(value / 4)


def in_words(parameters: float) -> str:
    """Return a number of parameters as 6.7 M or 2.6 B."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _epochs(rule: Mapping[str, Any], whole: Mapping[str, Any]) -> tuple[int, str]:
    """Return the updates that take each trajectory so often, and why."""
    count = value_at(whole, "trajectories.count", 0)
    samples = value_at(whole, "batch_size", 1) * value_at(whole, "gradient_accumulation", 1)
    if not all(isinstance(value, int) and value > 0 for value in (count, samples)):
        raise UserError(
            "updates follow from trajectories.count, batch_size and gradient_accumulation; expected whole numbers "
            f"above 0, got {count!r} trajectories and {samples!r} samples an update; or give phases of your own"
        )
    updates = max(1, round(rule["epochs"] * count / samples))
    return updates, f"each of {count} trajectories {rule['epochs']} times, {samples} an update"


def _phases(phases: list[dict[str, Any]], updates: int | None) -> list[dict[str, Any]]:
    """Return the phases with their updates: a share of all updates, or each as many as the family has."""
    if updates is None:
        return phases
    result = []
    for phase in phases:
        fields = {key: value for key, value in phase.items() if key != "share"}
        result.append({**fields, "updates": max(1, round(phase["share"] * updates)) if "share" in phase else updates})
    return result


def _above(fields: Mapping[str, Any], content: Mapping[str, Any], within: str = "") -> list[str]:
    """Return a line for each field of the preset that the recipe sets to another value."""
    lines = []
    for key, value in content.items():
        name, below = f"{within}{key}", fields.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            lines += _above(below, value, f"{name}.")
        elif key in fields and value != below:
            lines.append(
                f"{name}: the recipe's own, instead of the preset's" + ("" if name == "phases" else f" {below}")
            )
    return lines


def _table(sizes: Mapping[float, float]) -> str:
    return ", ".join(f"{value:g} at {in_words(float(size))}" for size, value in sizes.items())


def _flat(changes: Mapping[str, Any], within: str = "") -> str:
    """Return fields as text: model.dtype bfloat16, precision bf16."""
    parts = []
    for key, value in changes.items():
        parts.append(_flat(value, f"{within}{key}.") if isinstance(value, Mapping) else f"{within}{key} {value}")
    return ", ".join(parts)
