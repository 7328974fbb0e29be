"""The teacher's answers of a comparison on a task, in one file: the next student costs only its own passes.

Most passes of a comparison are the teacher's: its many steps, twice. They depend on the teacher and on the samples, and
on no student.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....errors import UserError
from ....files import write_whole
from .answers import Answers

logger = logging.getLogger(__name__)

VERSION = 1
HEADER = "flash.answers"
PICTURES = "pictures"
Origin = Mapping[str, Any]  # everything that the answers depend on, as JSON holds it


def save_answers(path: Path, origin: Origin, answers: Mapping[str, Answers]) -> None:
    """Write a safetensors file, whole or not at all; the origin goes into its header."""
    tensors: dict[str, Tensor] = {}
    for name, found in answers.items():
        tensors |= {f"{name}/kinds/{kind}": values for kind, values in found.features().items()}
        tensors |= {f"{name}/scores/{key}": torch.cat(parts) for key, parts in found.scores.items()}
        if found.pictures:
            tensors[f"{name}/{PICTURES}"] = (torch.stack(found.pictures) * 255).round().clamp(0, 255).to(torch.uint8)
    seconds = {name: found.seconds for name, found in answers.items()}
    facts = {"version": VERSION, "origin": origin, "seconds": seconds}
    header = {HEADER: json.dumps(facts, sort_keys=True)}
    tensors = {name: values.cpu().contiguous() for name, values in tensors.items()}
    write_whole(path, lambda partial: save_file(tensors, partial, header))


def load_answers(path: Path) -> tuple[dict[str, Any], dict[str, Answers]]:
    """Return the origin and the answers of a file.

    Raises:
        UserError: it is no such file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[HEADER])
            if facts["version"] != VERSION:
                raise ValueError(f"its version is {facts['version']}, expected {VERSION}")
            found = {name: Answers(seconds=float(seconds)) for name, seconds in facts["seconds"].items()}
            for key in file.keys():  # noqa: SIM118, no dict
                _put(found, key, file.get_tensor(key))
            return dict(facts["origin"]), found
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--reference: {path} holds no readable answers of a teacher to a task ({error or type(error).__name__}); "
            "remove it, or name another file, and it is made anew"
        ) from error


def _put(found: Mapping[str, Answers], key: str, values: Tensor) -> None:
    """Put a file's tensor into the answers that it belongs to."""
    name, part, *kind = key.split("/")
    if values.is_floating_point() and part == "kinds" and not bool(values.isfinite().all()):
        raise ValueError(f"{key} holds NaN or infinity")
    if part == PICTURES:
        found[name].pictures = list(values.float() / 255)
    else:
        {"kinds": found[name].kinds, "scores": found[name].scores}[part][kind[0]].append(values)


def find_answers(path: Path, wanted: Origin, names: Collection[str]) -> dict[str, Answers]:
    """Return the answers of a file that was made for the same teacher and samples; nothing where it is missing.

    Args:
        wanted: its ``samples`` is the number of rows of every run.
        names: of the runs whose answers are needed.

    Raises:
        UserError: the file is damaged, or belongs to another comparison; the message names what differs.
    """
    if not path.exists():
        return {}
    origin, found = load_answers(path)
    wanted = json.loads(json.dumps(wanted))  # as a file holds it: lists for tuples
    different = [name for name in sorted({*origin, *wanted}) if origin.get(name) != wanted.get(name)]
    if different:
        told = "; ".join(f"{name} is {origin.get(name)!r} there and {wanted.get(name)!r} now" for name in different)
        raise UserError(
            f"--reference: {path} belongs to another comparison: {told}. Name another file, which is made where it "
            "is missing, or remove this one"
        )
    for name in names:
        rows = {len(values) for values in found[name].features().values()} if name in found else set()
        if rows != {wanted["samples"]}:
            raise UserError(f"--reference: {path} lacks answers of {name}; remove it, and it is made anew")
    logger.info("the teacher's answers come from %s", path)
    return found
