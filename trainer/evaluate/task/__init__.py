"""The parts of a comparison on a task: samples, runs, figures, distances of sets, targets."""
