"""`flash-diffusion distill`: the plan of a run, its parts, its loop and its checkpoints."""
