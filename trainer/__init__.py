"""The headless trainer: diffusers, peft and accelerate around flash_core. Runs with no ComfyUI on the machine."""
