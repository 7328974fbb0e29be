"""The parts of a comparison on a task: runs, answers and their file, figures, distances of sets, targets."""
