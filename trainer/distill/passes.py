"""Count the network passes of an update, term by term: what a recipe costs, before it runs.

A pass is one forward pass of the network for one sample. A backward pass counts as two more.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...flash_core.grid import timestep_mixture
from ...flash_core.terms.draws import FIRST_STEP_FRACTION
from ..config import MethodSection, PhaseSection, Recipe
from .assembly import needs_critic

FORWARD_AND_BACKWARD = 3
GUIDED = 2  # both branches of classifier-free guidance
REAL_AND_FAKE = 2  # of an update of the discriminator


def update_passes(recipe: Recipe, phase: PhaseSection) -> dict[str, float]:
    """Return the expected passes of one update of ``phase`` in one process, by what they are for."""
    method = recipe.method
    samples = recipe.batch_size * recipe.gradient_accumulation
    start = timestep_mixture(method.teacher_steps, phase.modes).tolist()
    first = sum(share for index, share in enumerate(start) if 1 - index / len(start) > FIRST_STEP_FRACTION)
    passes = {
        "solutions": _solutions(recipe, phase, start),
        "own states": method.states.student * _first_steps(method.states.steps, start),
        "student": float(FORWARD_AND_BACKWARD),
    }
    if phase.adversarial:
        rows = 1.0 if method.adversarial_rows == "all" else first
        real = _real_passes(method)
        passes["adversarial"] = rows * (FORWARD_AND_BACKWARD + real)
        # The first update reads what the student's loss has seen; the next ones ask for real and fake anew.
        passes["discriminator"] = rows * (1 - real + REAL_AND_FAKE * (method.discriminator.updates - 1))
    if phase.dmd:
        rows = 1.0 if method.dmd.rows == "all" else first
        real = {"decoupled": 3}.get(method.dmd.form, 1 if method.dmd.guidance == 1 else GUIDED)
        passes["dmd"] = rows * (real + 1)
        if needs_critic(recipe):
            passes["critic"] = (1.0 if method.critic.memory else rows) * FORWARD_AND_BACKWARD * method.critic.updates
    if phase.feature_matching:
        passes["feature matching"] = (1.0 if method.feature_rows == "all" else first) * (FORWARD_AND_BACKWARD + 1)
    if phase.intra_segment:
        passes["intra-segment"] = GUIDED + 1.0
    return {name: value * samples for name, value in passes.items() if value}


def warmup_passes(recipe: Recipe, phase: PhaseSection) -> float:
    """Return the passes of discriminator and critic alone before ``phase``, the first phase that trains them."""
    update, method = update_passes(recipe, phase), recipe.method
    passes, longest = 0.0, 0
    if phase.adversarial:
        rows = update["adversarial"] / (FORWARD_AND_BACKWARD + _real_passes(method))
        passes += method.discriminator.warmup * rows * REAL_AND_FAKE
        longest = method.discriminator.warmup
    if "critic" in update:
        passes += method.critic.warmup * update["critic"] / method.critic.updates
        longest = max(longest, method.critic.warmup)
    student = update["student"] / FORWARD_AND_BACKWARD  # its outputs, without a gradient
    return passes + longest * (student + update.get("solutions", 0.0) + update.get("own states", 0.0))


def solution_passes(start: Sequence[float]) -> float:
    """Return the teacher's passes of one solution, expected over the starts; ``start`` has the share of each index."""
    return GUIDED * sum(share * (len(start) - index) for index, share in enumerate(start))


def _real_passes(method: MethodSection) -> int:
    """Return the passes on a real sample that the student's adversarial loss asks for."""
    return 1 if method.adversarial == "relativistic" else 0


def _solutions(recipe: Recipe, phase: PhaseSection, start: Sequence[float]) -> float:
    """Return the teacher's passes of a sample's solution in an update; recorded ones are replayed."""
    method, states = recipe.method, recipe.method.states
    reads = method.settings().reads_solution(phase.phase())
    below_noise = [0.0, *start[1:]]
    if recipe.trajectories.count:
        return states.student * solution_passes(below_noise) if reads else 0.0
    whole = GUIDED * len(start) * states.trajectory * sum(below_noise)
    rest = solution_passes(start) - states.trajectory * solution_passes(below_noise)
    return whole + rest if reads or states.trajectory else 0.0


def _first_steps(steps: Sequence[int], start: Sequence[float]) -> float:
    """Return the student's passes to its own state, expected over starts and over the step counts of its runs."""
    total = 0.0
    for index, share in enumerate(start[1:], 1):
        runs = [max(1, min(int(index / len(start) * count + 0.5), count - 1)) for count in steps]
        total += share * sum(runs) / len(runs)
    return total
