"""The figures of a comparison on a task beside the task's own."""

from __future__ import annotations

from ...tasks.figures import Figure

_SETS = (
    "Distance between the set of results and an independent set of the teacher’s many-step results, with the same "
    "conditions and other noise. The teacher’s own figure is the floor: two sets of its own pictures."
)
FRECHET = Figure("fd", "Fréchet distance to the teacher’s pictures", "FD", _SETS, higher_is_better=False)
FRECHET_STATES = Figure(
    "fd_states",
    "Fréchet distance in the teacher’s hidden states",
    "FD states",
    "The same in the frozen teacher’s hidden states, reduced to at most 64 whitened directions.",
    higher_is_better=False,
)
FRECHET_RANDOM = Figure(
    "fd_random",
    "Fréchet distance in random features",
    "FD random",
    "The same in random convolutional features (arXiv 2002.09797), reduced in the same way: no training has seen them.",
    higher_is_better=False,
)
FRECHET_ORIGINALS = Figure(
    "fd_originals",
    "Fréchet distance to the originals",
    "FD orig.",
    "Distance between the set of results and the originals after the autoencoder. Guidance moves the teacher itself "
    "away from the originals.",
    higher_is_better=False,
)
PAIRED = Figure(
    "paired",
    "Feature distance to the teacher’s result",
    "to teacher",
    "Mean distance between a result and the teacher’s many-step result for the same conditions and noise; 0 = the same "
    "picture. After its first step the student draws fresh noise, so it makes another picture, not a worse one.",
    higher_is_better=False,
)
KIND_OF = {FRECHET.key: "features", FRECHET_STATES.key: "states", FRECHET_RANDOM.key: "random"}
OF_SETS = (FRECHET, FRECHET_STATES, FRECHET_RANDOM, FRECHET_ORIGINALS)
