"""Inpainting, face-swap, further channels and upscaling: nodes that work on pictures."""
