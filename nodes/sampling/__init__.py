"""Few-step sampling, and comparing it with many steps."""
