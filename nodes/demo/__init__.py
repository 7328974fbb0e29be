"""Build the embedded demo's models as ComfyUI objects."""
