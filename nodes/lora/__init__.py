"""Load LoRA files into a MODEL."""
