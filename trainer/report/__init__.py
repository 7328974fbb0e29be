"""`flash-diffusion report`: an evaluation as a page and as tables."""
