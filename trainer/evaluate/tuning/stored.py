"""``sampler.json`` in a run's folder: the measured stochasticity, which every later export of the run writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...errors import UserError
from ...files import write_text_whole
from ..request import TEXT_TO_IMAGE

FILE = "sampler.json"


@dataclass(frozen=True)
class Tuned:
    """The measured stochasticity of a LoRA.

    Attributes:
        stochasticity: {step count: share of fresh noise}.
        distances: {step count: {stochasticity: Fréchet distance to the teacher's set}}.
        floor: the distance between two sets of the teacher's own; None where it was not measured.
        features: the network that the distances come from.
        samples: pictures a set.
        seeds: sets; distances, and the floor where it was measured, are means over them.
        updates: of the training that the LoRA came from; empty where unknown.
        task: of the LoRA.
    """

    stochasticity: Mapping[int, float]
    distances: Mapping[int, Mapping[float, float]]
    floor: float | None
    features: str
    samples: int
    updates: str = ""
    task: str = TEXT_TO_IMAGE
    seeds: int = 1

    def write(self, path: Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_text_whole(path, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")


def read_tuned(run: Path) -> Tuned | None:
    """Return what was measured for a run; None where nothing was.

    Raises:
        UserError: the file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        tuned = Tuned(**json.loads(path.read_text(encoding="utf-8")))
        tuned = replace(
            tuned,
            stochasticity={int(steps): float(share) for steps, share in tuned.stochasticity.items()},
            distances={
                int(steps): {float(share): float(value) for share, value in row.items()}
                for steps, row in tuned.distances.items()
            },
        )
        if not all(0 <= share <= 1 for share in tuned.stochasticity.values()):
            raise ValueError("a stochasticity is not in 0..1")
        return tuned
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read: {error}; delete it, and measure again with "
            f"`flash-diffusion evaluate --run {run} --tune-sampler --write`"
        ) from error
