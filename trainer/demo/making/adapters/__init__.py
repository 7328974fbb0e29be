"""What trains beside the demo's teacher: task adapters, controls, a style LoRA."""
