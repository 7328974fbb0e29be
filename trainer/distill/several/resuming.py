"""Let a run go on with another number of processes: they share the same samples of an update."""

from __future__ import annotations

import logging
from pathlib import Path

from ...config import Recipe
from ...export.training_state import TrainingState


def batch_samples(recipe: Recipe, state: TrainingState, before: int) -> int:
    """Return the samples of a batch, in all processes together, before the run was stopped.

    Args:
        before: processes that made the last update.
    """
    return state.samples or before * recipe.batch_size


def shared_again(recipe: Recipe, state: TrainingState, processes: int) -> Recipe:
    """Return the recipe with the ``batch_size`` with which ``processes`` processes make the same updates as before.

    The recipe stays as it is where no update is made yet, where the batch can't be shared evenly, or where each
    process has trajectories of its own (``trajectories.reuse``).
    """
    if not state.update or not state.processes or recipe.trajectories.reuse is not None:
        return recipe
    samples = batch_samples(recipe, state, state.processes)
    if samples % processes or samples // processes == recipe.batch_size:
        return recipe
    return recipe.model_copy(update={"batch_size": samples // processes})


def goes_on_exactly(
    recipe: Recipe, state: TrainingState, last: Path, before: int, processes: int, logger: logging.Logger
) -> bool:
    """Return whether the run goes on exactly, and log what another number of processes changes.

    Args:
        recipe: with the present batch size.
        before, processes: the numbers of processes, then and now.
    """
    then, now = batch_samples(recipe, state, before), processes * recipe.batch_size
    if before > 1 and not state.samples:
        logger.warning(
            "%s is of a version in which each of %d processes drew numbers of its own. Weights, optimisers and the "
            "order of the samples go on; the random numbers are new",
            *(last, before),
        )
        return False
    if then == now and before != processes and recipe.trajectories.reuse is not None:
        logger.warning(
            "%s: processes before: %d, now: %d. With trajectories.reuse each process makes its own trajectories, so "
            "the result is not that of a run that never stopped. To continue exactly, start as many as before",
            *(last, before, processes),
        )
        return False
    if then != now:
        factor = recipe.gradient_accumulation
        logger.warning(
            "%s: processes before: %d, now: %d. Weights, optimisers and the order of the samples go on. "
            "The random numbers are new, and an update has %d samples instead of %d, so the result is not that of a "
            "run that never stopped. To continue exactly, start as many processes as before, or a number that "
            "divides %d",
            *(last, before, processes, now * factor, then * factor, then),
        )
        return False
    if before != processes:
        logger.info(
            "processes before: %d, now: %d. An update keeps its samples: each process now takes %d samples of a batch "
            "of %d. If they do not fit into a device's memory, start as many processes as before",
            *(before, processes, recipe.batch_size, then),
        )
    return True
