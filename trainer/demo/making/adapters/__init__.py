"""Train the small networks beside the demo's teacher: task adapters, control networks, a style LoRA."""
