"""Teachers: one file per model family, each building a Denoiser from a diffusers folder or a single file."""
