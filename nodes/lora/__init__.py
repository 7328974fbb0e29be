"""LoRA files into a MODEL."""
