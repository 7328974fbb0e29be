"""`flash-diffusion evaluate --tune-sampler`: measure which stochasticity draws best at each step count."""
