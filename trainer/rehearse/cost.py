"""What a rehearsed run costs on a card, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import Recipe
from ..distill.passes import GUIDED, recorded_trajectories, trajectory_passes, update_passes, warmup_passes
from .gpus import BUS, GIB, GIGA, RESERVED, UTILISATION, Gpu
from .walk import Rehearsal, rehearse


@dataclass(frozen=True)
class Cost:
    """Work and time of a whole run in one process.

    Attributes:
        flops: of all updates, of recorded trajectories and of warm-ups.
        hours: at the stated utilisation, or as long as the bytes need where that is longer.
        bound: ``arithmetic``, ``memory`` or ``bus`` (copies of a waiting base): which of the three decides. They are
            taken to go on at the same time.
    """

    flops: float
    hours: float
    bound: str


def cost_of(rehearsal: Rehearsal, gpu: Gpu, utilisation: float = UTILISATION) -> Cost:
    """Return what a run costs on a card.

    Args:
        utilisation: share of the card's peak FLOP/s that training reaches, in (0, 1].
    """
    recipe = rehearsal.recipe
    flops = moved = crossed = 0.0
    for phase in rehearsal.phases:
        flops += phase.updates * phase.flops
        moved += phase.updates * phase.moved
        crossed += phase.updates * phase.crossed
    recording, alone = _recording_passes(recipe), _passes_of_learners_alone(recipe)
    flops += rehearsal.pass_flops * (recording + alone)
    calls = recording / (GUIDED * recipe.trajectories.batch) + alone / recipe.batch_size
    seconds = {
        "arithmetic": flops / (gpu.flops(recipe.precision) * utilisation),
        "memory": moved / (gpu.bandwidth * GIGA),
        "bus": (crossed + calls * rehearsal.waiting) / (BUS * GIGA),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Cost(flops, seconds[bound] / 3600, bound)


def _recording_passes(recipe: Recipe) -> float:
    """Return the passes that record trajectories before updates; later ones are among the passes of an update."""
    recorded = 0 if recipe.trajectories.reuse else recorded_trajectories(recipe)
    return float(recorded * trajectory_passes(recipe.method))


def _passes_of_learners_alone(recipe: Recipe) -> float:
    """Return the passes of discriminator and critic alone, before the phases that need them first."""
    passes = 0.0
    learnt: set[str] = set()
    for phase in recipe.phases:
        learners = ({"critic"} & set(update_passes(recipe, phase))) | (
            {"discriminator"} if phase.adversarial else set()
        )
        if learners - learnt:
            passes += warmup_passes(recipe, phase)
        learnt |= learners
    return passes


def fits(bytes_needed: float, gib: float) -> bool:
    """Return True where a peak and what is reserved are at most ``gib`` GiB."""
    return bytes_needed / GIB + RESERVED <= gib


@dataclass(frozen=True)
class Way:
    """A change of the recipe and the peak that it leads to.

    Attributes:
        words: what to set.
        training, encoding: peaks in bytes.
    """

    words: str
    training: float
    encoding: float

    def fits(self, gib: float) -> bool:
        """Return True where both peaks fit."""
        return fits(max(self.training, self.encoding), gib)


def peaks(rehearsal: Rehearsal) -> tuple[int, int]:
    """Return the highest peak of training with its previews, and that of the encoding before it."""
    moments = rehearsal.moments
    return max(one.peak for name, one in moments.items() if name != "encoding"), moments["encoding"].peak


def ways_to_fit(rehearsal: Rehearsal, gib: float) -> Iterator[Way]:
    """Rehearse changes in the order of their price until one fits; every one stands on the one before."""
    recipe = rehearsal.recipe
    training, encoding = peaks(rehearsal)
    settings: dict[str, str] = {}
    for changes in _settings(recipe, fits(training, gib), fits(encoding, gib)):
        settings |= {name: _yaml(value) for name, value in changes.items()}
        for name, value in changes.items():
            recipe = _changed(recipe, name, value)
        words = ", ".join(f"{name}={value}" for name, value in settings.items())
        way = Way(words, *peaks(rehearse(recipe)))
        yield way
        if way.fits(gib):
            return


def _settings(recipe: Recipe, trains: bool, encodes: bool) -> Iterator[dict[str, object]]:
    """Yield fields that save memory with their values, where they are not set and would help."""
    if not encodes:
        if recipe.data.encode_batch > 1:
            yield {"data.encode_batch": 1}
        if recipe.model.family in ("sd3", "sd35") and recipe.model.t5:
            yield {"model.t5": False}
    if not trains:
        if not recipe.gradient_checkpointing:
            yield {"gradient_checkpointing": True}
        if recipe.batch_size > 1:
            yield {"batch_size": 1, "gradient_accumulation": recipe.batch_size * recipe.gradient_accumulation}
        free: dict[str, object] = {} if recipe.optimizer.bits == 8 else {"optimizer.bits": 8}
        if not (recipe.memory.offload or recipe.asks_vae or recipe.sharding != "none"):
            free["memory.offload"] = True
        if not recipe.memory.preview_tiles:
            free["memory.preview_tiles"] = True
        if free:
            yield free
        if recipe.sharding == "none":
            if recipe.model.storage is None:
                yield {"model.storage": "int8"}
            if recipe.model.storage != "nf4":
                yield {"model.storage": "nf4"}
            if recipe.memory.base == "device" and recipe.speed.compile is None:
                yield {"memory.base": "cpu"}


def _changed(recipe: Recipe, name: str, value: object) -> Recipe:
    section, _, field = name.rpartition(".")
    if not section:
        return recipe.model_copy(update={field: value})
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={field: value})})


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
