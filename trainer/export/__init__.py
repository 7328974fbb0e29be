"""The finished LoRA and its model card."""
