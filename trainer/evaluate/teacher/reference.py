"""The teacher's own pictures as the reference, stored as features in one small file.

The teacher makes two sets in many steps with guidance, from the same prompts and independent noise. Every run starts
from the prompts and the noise of the second set, so each picture of a run can be compared with its twin in the second
set. The run's distribution is measured against the *first* set, whose noise the run has never seen. The distance
between the two sets is the floor: a perfect student scores the floor, not 0. The first set holds several pictures per
picture of the second set. This lowers the floor (which is due to chance alone) and costs nothing when a student is
evaluated.

The undistilled teacher's runs in few steps are stored too, since they never change.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ....flash_core.measures.whitening import Whitening, usable_directions
from ...errors import UserError
from ...files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

VERSION = 2  # of the file; 1 had the features of the feature network alone
FEW = "few/"  # prefix of few-step runs in the file
WHITENING = "whitening/"  # prefix of the reductions in the file
WHITENED = (
    "states",
    "random",
)  # kinds of features that are reduced, see :class:`.Whitening`
PICTURES_A_PROMPT = 2  # in a row; diversity needs at least two pictures of one prompt


@dataclass(frozen=True)
class Draw:
    """N prompts and N seeds that a set of pictures is made from. The first n of a draw are the draw of n samples."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    def rows(self, index: Iterable[int]) -> Draw:
        """Return the samples at ``index``."""
        index = list(index)
        return Draw(tuple(self.prompts[row] for row in index), tuple(self.seeds[row] for row in index))


def draw(prompts: Sequence[str], samples: int, seed: int, stream: int, times: int = 1) -> Draw:
    """Draw ``samples`` prompts, two pictures of each in a row, all of this ``times`` times, with one seed per picture.

    Args:
        prompts: a prompt that is listed n times is drawn n times as often. All streams of a seed have the same order of
            prompts, so two sets differ in their noise and not in their prompts.
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
    """Everything that a reference file depends on.

    Attributes:
        teacher, features: fingerprints of the weights, see :func:`~...files.fingerprint`.
        prompts: fingerprint of the list of prompts.
        samples: pictures in the second set and in every run.
        times: pictures in the first set per picture of the second set.
        preference: fingerprint of the preference model; empty = no scores.
        interval: lowest and highest uniform time at which the many steps are guided; None = everywhere.
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
    preference: str = ""
    interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Take an interval that was read from JSON, a list."""
        if self.interval is not None:
            object.__setattr__(self, "interval", tuple(self.interval))


@dataclass(frozen=True)
class FeatureSet:
    """One set of pictures as numbers.

    Attributes:
        features: embeddings (N, D) of the feature network.
        predicted: the predicted class of each picture (N,).
        more: further numbers of each picture, (N, ...), by name: ``states`` and ``random`` (other kinds of features),
            ``looks`` (sharpness, contrast), ``preference`` (scores, where there is a model for them).
    """

    features: Tensor
    predicted: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Sequence[int]) -> FeatureSet:
        """Return the pictures at ``index``."""
        index = list(index)
        more = {name: values[index] for name, values in self.more.items()}
        return FeatureSet(self.features[index], self.predicted[index], more)

    def whitened(self, whitenings: Mapping[str, Whitening]) -> FeatureSet:
        """Return this set with its kinds of features reduced."""
        reduced = {name: whitening(self.more[name]) for name, whitening in whitenings.items()}
        return replace(self, more={**self.more, **reduced})

    def kind(self, name: str) -> Tensor:
        """Return the features of a kind: ``features``, ``states`` or ``random``."""
        return self.features if name == "features" else self.more[name]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what a file stores; kinds in half precision, a thousandth of whose spread is what a file needs."""
        found = {"features": self.features, "predicted": self.predicted}
        found |= {name: values.half() if name in WHITENED else values for name, values in self.more.items()}
        return {f"{prefix}.{name}": values.contiguous() for name, values in found.items()}


@dataclass(frozen=True)
class Reference:
    """The teacher's sets: runs are measured against ``first``; ``second`` shares prompts and noise with every run.

    Attributes:
        few: the undistilled teacher's runs in few steps, by name.
        whitenings: of the kinds in ``WHITENED``, fitted to ``first``; all sets are reduced by them.
    """

    origin: Origin
    first: FeatureSet
    second: FeatureSet
    few: Mapping[str, FeatureSet]
    whitenings: Mapping[str, Whitening]

    @classmethod
    def of(cls, origin: Origin, first: FeatureSet, second: FeatureSet, few: Mapping[str, FeatureSet]) -> Reference:
        """Return the reference of sets that are not reduced yet.

        Few samples get few directions, so that a distance in them is more than its own bias, see ``samples_needed``.
        """
        usable = usable_directions(origin.samples, origin.times)
        whitenings = {name: Whitening.of(first.more[name], usable) for name in WHITENED}

        def reduced(made: FeatureSet) -> FeatureSet:
            found = made.whitened(whitenings)
            # As a file holds them: a reference gives the same figures before and after its file.
            return replace(found, more={**found.more, **{name: found.more[name].half().float() for name in WHITENED}})

        return cls(
            origin, reduced(first), reduced(second), {name: reduced(made) for name, made in few.items()}, whitenings
        )

    def mismatch(self, wanted: Origin) -> str | None:
        """Return why this reference does not fit, or None. A reference with more samples than wanted fits."""
        for name, value in asdict(wanted).items():
            own = getattr(self.origin, name)
            if name == "preference" and not value:
                continue  # scores that nobody asks for do no harm
            if own < value if name == "samples" else own != value:
                return f"{name} is {own!r} there and {value!r} now"
        return None

    def head(self, samples: int) -> Reference:
        """Return the part that belongs to the first ``samples`` pictures of the second set."""
        rows = range(samples)
        first = [row for row in range(len(self.first.features)) if row % self.origin.samples < samples]
        few = {name: made.rows(rows) for name, made in self.few.items()}
        origin = replace(self.origin, samples=samples)
        return Reference(origin, self.first.rows(first), self.second.rows(rows), few, self.whitenings)

    def save(self, path: Path) -> None:
        """Write a safetensors file; the origin goes into its header."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, made in {"first": self.first, "second": self.second, **_prefixed(self.few)}.items():
            tensors |= made.tensors(name)
        for name, whitening in self.whitenings.items():
            tensors |= whitening.tensors(f"{WHITENING}{name}")
        header = {"flash.reference": json.dumps({"version": VERSION, **asdict(self.origin)})}
        write_whole(path, lambda partial: save_file(tensors, partial, header))

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a file of :meth:`save`.

        Raises:
            UserError: the file is damaged, is not a reference file, or has another version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("flash.reference", "{}"))
                if (version := header.pop("version", None)) != VERSION:
                    was = f"of version {version}" if version else "no reference file"
                    raise UserError(
                        f"{path} is {was}, expected a reference file of version {VERSION}; make one with "
                        f"`flash-diffusion evaluate --make-reference --reference FILE`"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sets = _sets(tensors)
            few = {name.removeprefix(FEW): made for name, made in sets.items() if name.startswith(FEW)}
            whitenings = {name: Whitening.stored(tensors, f"{WHITENING}{name}") for name in WHITENED}
            return cls(Origin(**header), sets["first"], sets["second"], few, whitenings).checked()
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} can't be read as a reference file ({type(error).__name__}: {error}); it is damaged, or "
                "another file; remove it, or name another file"
            ) from error

    def checked(self) -> Reference:
        """Return this reference if its sets have the sizes of its origin and hold finite numbers.

        Raises:
            ValueError: they do not.
        """
        samples = self.origin.samples
        sizes = {"first": (self.first, samples * self.origin.times), "second": (self.second, samples)}
        sizes |= {name: (made, samples) for name, made in self.few.items()}
        for name, (made, size) in sizes.items():
            if made.features.shape != (size, self.second.features.shape[1]) or made.predicted.shape != (size,):
                raise ValueError(f"the set {name!r} has not the size that the header says")
            if made.more.keys() != self.second.more.keys() or not set(WHITENED) <= made.more.keys():
                raise ValueError(f"the set {name!r} lacks a kind of features")
            for values in (made.features, *made.more.values()):
                if len(values) != size or not bool(values.isfinite().all()):
                    raise ValueError(
                        f"the set {name!r} holds NaN or infinity, or has not the size that the header says"
                    )
        return self


def _prefixed(few: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
    return {f"{FEW}{name}": made for name, made in few.items()}


def _sets(tensors: Mapping[str, Tensor]) -> dict[str, FeatureSet]:
    """Return the sets of a file by name; the part after the last dot says what a tensor is."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, values in tensors.items():
        if not name.startswith(WHITENING):
            prefix, _, kind = name.rpartition(".")
            parts.setdefault(prefix, {})[kind] = values.float() if values.is_floating_point() else values
    return {prefix: FeatureSet(found.pop("features"), found.pop("predicted"), found) for prefix, found in parts.items()}


def find_reference(paths: Sequence[Path], wanted: Origin) -> Reference | None:
    """Return the first stored reference that fits. Log why each other file does not fit, or can't be read."""
    for path in paths:
        if not path.exists():
            logger.info("There is no reference at %s.", path)
            continue
        try:
            reference = Reference.load(path)
        except UserError as error:
            logger.warning("%s. The reference is made anew.", error)
            continue
        if (mismatch := reference.mismatch(wanted)) is None:
            return reference.head(wanted.samples)
        logger.warning("The reference %s does not fit this evaluation: %s.", path, mismatch)
    return None


def check_overwrite(path: Path) -> None:
    """Check that a reference may be written to a path: nothing is there, or a reference.

    Raises:
        UserError: another file is there.
    """
    if path.exists():
        try:
            Reference.load(path)
        except UserError as error:
            raise UserError(
                f"--make-reference would overwrite {path}, which is not a readable reference; remove that file, or "
                "name another one with --reference"
            ) from error
