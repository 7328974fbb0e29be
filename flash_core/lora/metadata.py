"""The metadata of a Flash LoRA in its safetensors header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..families import family_of
from ..process import NUM_TIMESTEPS

FORMAT_VERSION = "1"
PREFIX = "flash."
TRAINING_PREFIX = "flash.training."
MAX_GRIDS = 64
LORA = "/lora"  # ends the ModelSpec name of a LoRA's architecture
PAPER_STOCHASTICITY = 1.0  # fresh noise at every step (arXiv 2406.02347, section 4.1)
STOCHASTICITY_KEY = "flash.stochasticity"


@dataclass(frozen=True)
class FlashMetadata:
    """The settings that a sampler needs, and the origin of the file.

    Attributes:
        base: the key of the family in :data:`~..families.FAMILIES`: ``sd15``, ``sdxl``, ``flash-demo`` ...
        task: ``text-to-image``, ``inpainting``, ...
        prediction: the output of the base: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
        process: ``vp`` or ``flow``.
        timesteps: {step count: the timesteps that the student evaluates, from noise on}.
        steps: the best step count. Default: 4.
        stochasticity: {step count: share of fresh noise between steps, in 0..1}; empty for the paper's 1. Other step
            counts take the nearest: see :func:`nearest_stochasticity`.
        guidance: the scale of classifier-free guidance to sample with; 1 is no guidance. Default: 1.
        teacher: the teacher's name; ``teacher_hash`` identifies its weights.
        recipe_hash: identifies the recipe of the training.
        architecture: the base's name in ModelSpec; empty for the name that follows from ``base`` and ``prediction``.
        training: more facts of the training, as strings.
    """

    base: str
    prediction: str
    process: str
    timesteps: Mapping[int, tuple[float, ...]]
    task: str = "text-to-image"
    steps: int = 4
    guidance: float = 1.0
    stochasticity: Mapping[int, float] = field(default_factory=dict)
    title: str = "Flash LoRA"
    teacher: str = ""
    teacher_hash: str = ""
    recipe_hash: str = ""
    license: str = ""
    architecture: str = ""
    training: Mapping[str, str] = field(default_factory=dict)

    def to_header(self) -> dict[str, str]:
        """Return the header's strings."""
        header = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"{self.architecture or _architecture(self.base, self.prediction)}{LORA}",
            "modelspec.implementation": "diffusers",
            "modelspec.title": self.title,
            "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(
                self.prediction, self.prediction
            ),
            "flash.version": FORMAT_VERSION,
            "flash.base": self.base,
            "flash.task": self.task,
            "flash.prediction": self.prediction,
            "flash.process": self.process,
            "flash.timesteps": json.dumps({str(steps): list(grid) for steps, grid in self.timesteps.items()}),
            "flash.steps": str(self.steps),
            "flash.guidance": repr(float(self.guidance)),
            "flash.teacher": self.teacher,
            "flash.teacher_hash": self.teacher_hash,
            "flash.recipe": self.recipe_hash,
        }
        if self.stochasticity:
            header[STOCHASTICITY_KEY] = stochasticity_string(self.stochasticity)
        if self.license:
            header["modelspec.license"] = self.license
        header.update({f"{TRAINING_PREFIX}{name}": value for name, value in self.training.items()})
        return header

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> FlashMetadata | None:
        """Read the metadata from a header; return None without ``flash.version``.

        Raises:
            ValueError: a field of the header is missing or unreadable; the message names the field.
        """
        if "flash.version" not in header:
            return None
        try:
            timesteps = _timesteps(json.loads(header["flash.timesteps"]))
            guidance = float(header.get("flash.guidance", "1"))
            if not math.isfinite(guidance):
                raise ValueError(f"flash.guidance is {guidance}")
            return cls(
                base=header["flash.base"],
                task=header.get("flash.task", "text-to-image"),
                prediction=header["flash.prediction"],
                process=header["flash.process"],
                timesteps=timesteps,
                steps=int(header.get("flash.steps", "4")),
                guidance=guidance,
                stochasticity=_stochasticity(json.loads(header.get(STOCHASTICITY_KEY, "{}"))),
                title=header.get("modelspec.title", "Flash LoRA"),
                teacher=header.get("flash.teacher", ""),
                teacher_hash=header.get("flash.teacher_hash", ""),
                recipe_hash=header.get("flash.recipe", ""),
                license=header.get("modelspec.license", ""),
                architecture=_told_architecture(header),
                training={
                    name[len(TRAINING_PREFIX) :]: value
                    for name, value in header.items()
                    if name.startswith(TRAINING_PREFIX)
                },
            )
        except KeyError as missing:
            raise ValueError(f"the Flash LoRA header lacks the field {missing}") from missing
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"the Flash LoRA header can't be read: {error}") from error


def stochasticity_string(shares: Mapping[int, float]) -> str:
    """Return {step count: share of fresh noise} as the header's string."""
    return json.dumps({str(steps): float(share) for steps, share in sorted(shares.items())})


def nearest_stochasticity(shares: Mapping[int, float], steps: int) -> tuple[float, int | None]:
    """Return the share of fresh noise for a step count, and the listed step count that it belongs to.

    A step count that is not listed takes the share of the nearest listed one by ratio: 3 steps are nearer to 4 than to
    2. Of two equally near ones the larger is taken. One step adds no noise, so its share has no effect.

    Args:
        shares: {step count: share of fresh noise}. Empty: the paper's 1, which belongs to no step count.
    """
    counts = [count for count in shares if count > 1] or list(shares)
    if not counts:
        return PAPER_STOCHASTICITY, None
    nearest = steps if steps in shares else min(counts, key=lambda count: (max(count / steps, steps / count), -count))
    return float(shares[nearest]), nearest


def _architecture(base: str, prediction: str) -> str:
    """Return the ModelSpec name that follows from family and prediction; the key itself for families of others."""
    family = family_of(base)
    return base if family is None else family.architecture_of(prediction)


def _told_architecture(header: Mapping[str, str]) -> str:
    """Return the architecture of a header; empty if it follows from family and prediction, or is missing."""
    told = header.get("modelspec.architecture", "").removesuffix(LORA)
    return "" if told == _architecture(header["flash.base"], header["flash.prediction"]) else told


def _stochasticity(shares: Mapping[str, float]) -> dict[int, float]:
    """Return {step count: share of fresh noise in [0, 1]}.

    Raises:
        ValueError: too many step counts, a step count below 1, or a share outside of 0..1.
    """
    stochasticity = {int(steps): float(share) for steps, share in shares.items()}
    in_range = all(steps >= 1 and 0 <= share <= 1 for steps, share in stochasticity.items())
    if len(stochasticity) > MAX_GRIDS or not in_range:
        raise ValueError(f"{STOCHASTICITY_KEY} should be at most {MAX_GRIDS} step counts with numbers in 0..1")
    return stochasticity


def _timesteps(grids: Mapping[str, Sequence[float]]) -> dict[int, tuple[float, ...]]:
    """Return {step count: timesteps in [0, 1000]}.

    Raises:
        ValueError: too many grids, or a number outside of 0..1000.
    """
    timesteps = {int(steps): tuple(float(t) for t in grid) for steps, grid in grids.items()}
    if len(timesteps) > MAX_GRIDS or not all(0 <= t <= NUM_TIMESTEPS for grid in timesteps.values() for t in grid):
        raise ValueError(f"flash.timesteps should be at most {MAX_GRIDS} grids of numbers in 0..{NUM_TIMESTEPS}")
    return timesteps
