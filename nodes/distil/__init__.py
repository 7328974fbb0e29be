"""Wrap a ComfyUI MODEL as a Denoiser, so that flash_core can distil it."""
