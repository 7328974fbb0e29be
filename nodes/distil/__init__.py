"""A ComfyUI MODEL as a Denoiser, which flash_core can distil."""
