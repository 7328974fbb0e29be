"""The embedded demo as ComfyUI objects."""
