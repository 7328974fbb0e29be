"""Few-step sampling, and its comparison with many steps."""
