"""Train a LoRA on a denoiser: settings, data, the loop, its state on disk, pictures. ComfyUI is not needed here."""
