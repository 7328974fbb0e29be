"""The floor: the work that the method itself asks of the base, with nothing of how an update is made.

FLOPs: of the passes that the recipe asks for, only products with the base's own weights and those of attention. A
multiplication and an addition are two. A forward pass takes each product once. Its backward pass, to a LoRA or to the
network's input, takes each product with a frozen weight once more (no gradient of the weight) and each product of
attention twice more, as far as autograd makes it. A pass for hidden states ends after the last block that is read. Not
in the floor: what checkpointing computes again, the scores that fused attention makes again, the products of LoRAs,
heads and decoder.

Bytes: the base is read once for each call that must follow another one, and each trained value with its gradient, its
moments and its average is read and written once. A call holds a batch with at most both branches of guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...flash_core.passes.asking import FORWARD_AND_BACKWARD
from ..config import PhaseSection, Recipe
from ..distill.passes import GUIDED, REAL_AND_FAKE, real_passes, update_passes
from .meter import ATTENTION, Moment

BASE = ("base", "control", ATTENTION)
FORWARD_ONLY = ("trajectories", "solutions", "own states", "dmd", "intra segment")
FORWARD_AND_BACK = ("student", "critic")
READS = 2  # of the base by a forward pass with its backward pass
USES_OF_WEIGHTS = 4  # by an optimiser: the weight and its gradient are read, the weight is written, as was the gradient
READ_AND_WRITTEN = 2


def of_base(moment: Moment) -> int:
    """Return the FLOPs of the base's own weights and of attention, without what is computed again."""
    return sum(moment.work.get(kind, 0) for kind in BASE)


@dataclass(frozen=True)
class PassWork:
    """FLOPs of the base for one sample.

    Attributes:
        forward: a forward pass.
        student: a forward pass with the student's LoRA, and the backward pass to the LoRA.
        features: a forward pass to the last hidden state that is read.
        to_input: the same, and the backward pass to the network's input.
    """

    forward: float
    student: float
    features: float
    to_input: float


@dataclass(frozen=True)
class Floor:
    """What an update needs at least.

    Attributes:
        flops: of the base.
        moved: bytes of weights and of the optimisers' state.
    """

    flops: float
    moved: float


def floor_of(recipe: Recipe, section: PhaseSection, work: PassWork, parts: Mapping[str, int]) -> Floor:
    """Return the floor of one update of a phase, expected over the starts of its samples.

    Args:
        parts: part -> bytes that stay while training.
    """
    passes, batch = update_passes(recipe, section), recipe.batch_size
    real = real_passes(recipe.method)
    flops = calls = 0.0
    for name, count in passes.items():
        if name in FORWARD_ONLY:
            flops += count * work.forward
            calls += count / GUIDED
        elif name in FORWARD_AND_BACK:
            flops += count / FORWARD_AND_BACKWARD * work.student
            calls += count / FORWARD_AND_BACKWARD * READS
        elif name == "adversarial":
            rows = count / (FORWARD_AND_BACKWARD + real)
            flops += rows * (work.to_input + real * work.features)
            calls += rows * READS
        elif name == "discriminator":
            flops += count * work.features
            calls += count / REAL_AND_FAKE
        elif name == "feature matching":
            rows = count / (FORWARD_AND_BACKWARD + 1)
            flops += rows * (work.to_input + work.features)
            calls += rows * READS
        else:
            raise ValueError(f"the floor does not know the passes {name!r}")
    trained = sum(parts.get(name, 0) for name in ("LoRA", "critic", "discriminator"))
    kept = sum(parts.get(name, 0) for name in ("optimisers", "moving average"))
    base = sum(parts.get(name, 0) for name in ("base", "control"))
    return Floor(flops, base * calls / batch + USES_OF_WEIGHTS * trained + READ_AND_WRITTEN * kept)


# What is above the floor -> the kinds of products that it is made of.
ABOVE = {
    "recomputed for checkpointing": ("recomputed",),
    "scores that attention makes again": ("attention's scores again",),
    "LoRAs and critic": ("LoRA", "critic", "other products"),
    "heads and decoder": ("discriminator", "VAE", "LPIPS"),
}
FURTHER = "passes that run further than they need"


def above_floor(work: Mapping[str, float], floor: float) -> dict[str, float]:
    """Return what the FLOPs of an update above its floor are spent on, in shares of the floor.

    Args:
        work: kind of product -> FLOPs.
        floor: FLOPs.
    """
    found = {name: sum(work.get(kind, 0.0) for kind in kinds) / floor for name, kinds in ABOVE.items()}
    named = {kind for kinds in ABOVE.values() for kind in kinds}
    found[FURTHER] = sum(value for kind, value in work.items() if kind not in named) / floor - 1
    return found
