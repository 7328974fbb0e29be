"""The parts of a comparison on a task: the figures beside the task's own, distances of sets, the targets."""
