"""Find everything that is wrong with a data set, before a model is loaded: `flash-diffusion data check`."""
