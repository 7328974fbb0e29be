"""Where training samples come from: shards, folders, the demo; their order; latents and text in memory."""
