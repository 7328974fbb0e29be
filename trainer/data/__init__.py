"""Where training samples come from: shards, folders with captions, the demo; their order; latents and text in memory."""
