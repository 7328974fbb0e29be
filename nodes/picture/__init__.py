"""Nodes that work on pictures: inpainting, face-swap, further input channels, upscaling."""
