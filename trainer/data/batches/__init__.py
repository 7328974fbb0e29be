"""The batches of a run: the order of the samples, recorded trajectories, rollouts."""
