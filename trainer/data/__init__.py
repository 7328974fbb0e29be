"""Where training samples come from: shards, folders with captions, the demo; latent and text caches."""
