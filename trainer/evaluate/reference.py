"""The teacher's own pictures as a yardstick, kept as features in one small file.

Two sets are made by the teacher in many steps with guidance, from the same prompts and independent noise. Every run is
generated from the prompts and the noise of the second set, so that it can be compared with that set picture by picture,
and its distribution is measured against the *first*, whose noise it has never seen. So the distance between the two
sets, the floor, is what a perfect student would score: sharing noise with the set that is measured against would let a
distance fall below it. The first set holds several pictures for each one of the second, which lowers the floor (it is
due to chance alone) and costs nothing when a student is evaluated.

What the undistilled teacher makes in few steps is kept as well, since it depends on nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # of the file
FEW = "few/"  # what the names of few-step runs begin with in the file
PICTURES_A_PROMPT = 2  # in a row; the least that shows how much pictures of one prompt differ


@dataclass(frozen=True)
class Draw:
    """What a set of pictures is made from: N prompts and N seeds. The start of a draw is the draw of a smaller set."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    def rows(self, index: Iterable[int]) -> Draw:
        """The samples at ``index``."""
        index = list(index)
        return Draw(tuple(self.prompts[row] for row in index), tuple(self.seeds[row] for row in index))


def draw(prompts: Sequence[str], samples: int, seed: int, stream: int, times: int = 1) -> Draw:
    """Draw ``samples`` prompts, two pictures of each in a row, and all of them ``times`` times, each with its own seed.

    Args:
        prompts: one that stands there several times is drawn so much more often. Their order is shuffled once for all
            streams of a seed, so that two sets differ in their noise and not in what they show.
        stream: sets of different streams share no noise.
    """
    if not prompts or samples < 2:
        raise ValueError(f"need at least 1 prompt and 2 samples, got {len(prompts)} and {samples}")
    order = random.Random(f"{seed}").sample(prompts, len(prompts))
    source = random.Random(f"{seed}/{stream}")
    return Draw(
        tuple(order[index // PICTURES_A_PROMPT % len(order)] for index in range(samples)) * times,
        tuple(source.getrandbits(32) for _ in range(samples * times)),
    )


@dataclass(frozen=True)
class Origin:
    """Everything that decides what is in a reference file.

    Attributes:
        teacher, features: fingerprints of the weights, see :func:`fingerprint`.
        prompts: fingerprint of the list of prompts.
        samples: pictures in the second set and in every run.
        times: pictures in the first set for each one of the second.
    """

    teacher: str
    features: str
    prompts: str
    samples: int
    times: int
    seed: int
    steps: int
    guidance: float
    solver: str


@dataclass(frozen=True)
class FeatureSet:
    """One set as the feature network sees it: embeddings (N, D) and the class it takes each picture for, (N,)."""

    features: Tensor
    predicted: Tensor

    def rows(self, index: Sequence[int]) -> FeatureSet:
        """The pictures at ``index``."""
        return FeatureSet(self.features[list(index)], self.predicted[list(index)])


@dataclass(frozen=True)
class Reference:
    """The teacher's sets: ``first`` is measured against, ``second`` shares prompts and noise with every run.

    Attributes:
        few: the undistilled teacher's runs in few steps, by name.
    """

    origin: Origin
    first: FeatureSet
    second: FeatureSet
    few: Mapping[str, FeatureSet]

    def mismatch(self, wanted: Origin) -> str | None:
        """Why this reference can't serve, in words, or None. One with more samples than wanted can."""
        for name, value in asdict(wanted).items():
            own = getattr(self.origin, name)
            if own < value if name == "samples" else own != value:
                return f"{name} is {own!r} there and {value!r} now"
        return None

    def head(self, samples: int) -> Reference:
        """The part of it that shows the first ``samples`` prompts of the second set."""
        rows = range(samples)
        first = [row for row in range(len(self.first.features)) if row % self.origin.samples < samples]
        few = {name: made.rows(rows) for name, made in self.few.items()}
        return Reference(replace(self.origin, samples=samples), self.first.rows(first), self.second.rows(rows), few)

    def save(self, path: Path) -> None:
        """Write to a safetensors file; the origin goes into its header."""
        from safetensors.torch import save_file

        tensors = {}
        for name, made in {"first": self.first, "second": self.second, **_prefixed(self.few)}.items():
            tensors[f"{name}.features"] = made.features.contiguous()
            tensors[f"{name}.predicted"] = made.predicted.contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"flash.reference": json.dumps({"version": VERSION, **asdict(self.origin)})})

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file is no reference, or of another version.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("flash.reference", "{}"))
            if header.pop("version", None) != VERSION:
                raise UserError(
                    f"{path} is not a reference file of version {VERSION}; make one with "
                    f"`flash-diffusion evaluate --make-reference --reference {path}`"
                )
            names = [key.removesuffix(".features") for key in file.keys() if key.endswith(".features")]  # noqa: SIM118
            sets = {
                name: FeatureSet(file.get_tensor(f"{name}.features"), file.get_tensor(f"{name}.predicted"))
                for name in names
            }
        few = {name.removeprefix(FEW): made for name, made in sets.items() if name.startswith(FEW)}
        return cls(Origin(**header), sets["first"], sets["second"], few)


def _prefixed(few: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
    return {f"{FEW}{name}": made for name, made in few.items()}
