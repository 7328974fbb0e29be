"""Count the network passes of an update, term by term: what a recipe costs, before it runs.

A pass is one forward pass of the network for one sample. A backward pass counts as two more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...flash_core.grid import timestep_mixture
from ...flash_core.passes.asking import FORWARD_AND_BACKWARD
from ...flash_core.passes.counting import CountedDenoiser
from ...flash_core.process import NUM_TIMESTEPS
from ...flash_core.terms.distribution_matching import bounds_of
from ...flash_core.terms.draws import FIRST_STEP_FRACTION
from ..config import MethodSection, PhaseSection, Recipe
from ..data.batches.rounds import Rounds
from .assembly import needs_critic

NO_GUIDANCE = (1.0, 1.0)
GUIDED = 2  # both branches of classifier-free guidance
REAL_AND_FAKE = 2  # of an update of the discriminator


def update_passes(recipe: Recipe, phase: PhaseSection) -> dict[str, float]:
    """Return the expected passes of one update of ``phase`` in one process, by what they are for."""
    method = recipe.method
    samples = recipe.batch_size * recipe.gradient_accumulation
    start = timestep_mixture(method.teacher_steps, phase.modes).tolist()
    first = sum(share for index, share in enumerate(start) if 1 - index / len(start) > FIRST_STEP_FRACTION)
    passes: dict[str, float] = {
        "trajectories": trajectory_passes(method) / (recipe.trajectories.reuse or math.inf),
        "solutions": _solutions(recipe, phase, start),
        "own states": method.states.student * _first_steps(method.states.steps, start),
        "student": float(FORWARD_AND_BACKWARD),
    }
    if phase.adversarial:
        rows = 1.0 if method.adversarial_rows == "all" else first
        real = real_passes(method)
        passes["adversarial"] = rows * (FORWARD_AND_BACKWARD + real)
        # The first update reads what the student's loss has seen; the next ones ask for real and fake anew.
        passes["discriminator"] = rows * (1 - real + REAL_AND_FAKE * (method.discriminator.updates - 1))
    if phase.dmd:
        rows = 1.0 if method.dmd.rows == "all" else first
        scores = 3 if method.dmd.form == "decoupled" else 1 + _guided_share_of_dmd(method)
        passes["dmd"] = rows * (scores + 1)
        if needs_critic(recipe):
            passes["critic"] = (1.0 if method.critic.memory else rows) * FORWARD_AND_BACKWARD * method.critic.updates
    if phase.feature_matching:
        passes["feature matching"] = (1.0 if method.feature_rows == "all" else first) * (FORWARD_AND_BACKWARD + 1)
    if phase.intra_segment:
        passes["intra segment"] = sum(share * cost for share, cost in zip(start, step_passes(method), strict=True)) + 1
    return {name: value * samples for name, value in passes.items() if value}


def warmup_passes(recipe: Recipe, phase: PhaseSection) -> float:
    """Return the passes of discriminator and critic alone before ``phase``, the first phase that trains them.

    Trajectories that are recorded meanwhile are not among them, see :func:`recorded_trajectories`.
    """
    update, method = update_passes(recipe, phase), recipe.method
    passes, longest = 0.0, 0
    if phase.adversarial:
        rows = update["adversarial"] / (FORWARD_AND_BACKWARD + real_passes(method))
        passes += method.discriminator.warmup * rows * REAL_AND_FAKE
        longest = method.discriminator.warmup
    if "critic" in update:
        passes += method.critic.warmup * update["critic"] / method.critic.updates
        longest = max(longest, method.critic.warmup)
    student = update["student"] / FORWARD_AND_BACKWARD  # its outputs, without a gradient
    beside = sum(update.get(name, 0.0) for name in ("solutions", "own states"))
    return passes + longest * (student + beside)


def step_passes(method: MethodSection) -> list[int]:
    """Return the teacher's passes of each step of its grid: 2 where it is guided, else 1."""
    count = method.teacher_steps
    low, high = (0, NUM_TIMESTEPS) if method.guidance_interval is None else method.guidance_interval
    times = [round(NUM_TIMESTEPS * (1 - index / count)) - 1 for index in range(count)]
    return [GUIDED if low <= time <= high and method.guidance != NO_GUIDANCE else 1 for time in times]


def trajectory_passes(method: MethodSection) -> int:
    """Return the teacher's passes of one trajectory from pure noise."""
    return sum(step_passes(method))


def solution_passes(start: Sequence[float], steps: Sequence[int] | None = None) -> float:
    """Return the teacher's passes of one solution, expected over the starts.

    Args:
        start: the share of each index of the grid.
        steps: passes of each step; default: all are guided.
    """
    steps = steps or [GUIDED] * len(start)
    return sum(share * sum(steps[index:]) for index, share in enumerate(start))


def recorded_trajectories(recipe: Recipe, processes: int = 1) -> int:
    """Return how many trajectories all processes record in the whole run, before training or meanwhile."""
    section, method = recipe.trajectories, recipe.method
    if section.reuse is None:
        return section.count
    learning = [phase for phase in recipe.phases if phase.adversarial or (phase.dmd and needs_critic(recipe))]
    alone = [method.discriminator.warmup] * any(phase.adversarial for phase in learning)
    alone += [method.critic.warmup] * any(phase.dmd and needs_critic(recipe) for phase in learning)
    batches = (recipe.updates + max(alone, default=0)) * recipe.gradient_accumulation
    rounds = Rounds(section.count // processes, section.reuse, recipe.batch_size, recipe.seed)
    return rounds.made(batches - 1) * processes


def passes_of_an_image(counted: CountedDenoiser) -> tuple[dict[str, float], float]:
    """Return the passes of an image by term, and those for unconditional branches, since the last call."""
    passes = {term: round(count / counted.images, 3) for term, count in sorted(counted.counts.items())}
    unconditional = round(sum(counted.unconditional.values()) / counted.images, 3)
    counted.forget()
    return passes, unconditional


def real_passes(method: MethodSection) -> int:
    """Return the passes on a real sample that the student's adversarial loss asks for."""
    return 1 if method.adversarial == "relativistic" else 0


def _guided_share_of_dmd(method: MethodSection) -> float:
    """Return the share of DMD's samples whose real score is guided."""
    scales = method.guidance if method.dmd.guidance is None else (method.dmd.guidance,) * 2
    if scales == NO_GUIDANCE:
        return 0.0
    if method.guidance_interval is None:
        return 1.0
    low, high = bounds_of(method.settings())
    first, last = max(low, method.guidance_interval[0]), min(high, method.guidance_interval[1])
    return max(0, last - first + 1) / (high - low + 1)


def _solutions(recipe: Recipe, phase: PhaseSection, start: Sequence[float]) -> float:
    """Return the teacher's passes of a sample's solution in an update; recorded ones are replayed."""
    method, states, steps = recipe.method, recipe.method.states, step_passes(recipe.method)
    reads = method.settings().reads_solution(phase.phase())
    below_noise = [0.0, *start[1:]]
    if recipe.trajectories.count:
        return states.student * solution_passes(below_noise, steps) if reads else 0.0
    whole = sum(steps) * states.trajectory * sum(below_noise)
    rest = solution_passes(start, steps) - states.trajectory * solution_passes(below_noise, steps)
    return whole + rest if reads or states.trajectory else 0.0


def _first_steps(steps: Sequence[int], start: Sequence[float]) -> float:
    """Return the student's passes to its own state, expected over starts and over the step counts of its runs."""
    total = 0.0
    for index, share in enumerate(start[1:], 1):
        runs = [max(1, min(int(index / len(start) * count + 0.5), count - 1)) for count in steps]
        total += share * sum(runs) / len(runs)
    return total
